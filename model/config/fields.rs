//! Typed access to the keys of a JSON object; errors name key, value and what is accepted.
//!
//! Invariant: an absent key and an explicit `null` are the same thing, as in the Python classes.
//! Used by `config.rs` only; knows JSON, not networks.

use super::{ConfigError, EOS_COUNT_MAX};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// Characters of an offending value that an error message repeats.
const VALUE_CHARS_MAX: usize = 80;

/// A JSON object, with the names that errors need.
pub(super) struct Fields<'a> {
    file: &'static str,
    parent: &'static str,
    object: &'a Map<String, Value>,
}

/// Parses a text that must be one JSON object.
pub(super) fn parse_object(
    file: &'static str,
    json: &str,
) -> Result<Map<String, Value>, ConfigError> {
    match serde_json::from_str(json) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(ConfigError::NotObject { file }),
        Err(source) => Err(ConfigError::Json { file, source }),
    }
}

impl<'a> Fields<'a> {
    /// The object at the top of a file.
    pub(super) fn root(file: &'static str, object: &'a Map<String, Value>) -> Self {
        Self { file, parent: "", object }
    }

    /// The object under `key`, if there is one.
    pub(super) fn child(&self, key: &'static str) -> Result<Option<Fields<'a>>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(object)) => {
                Ok(Some(Fields { file: self.file, parent: key, object }))
            }
            Some(_) => Err(self.refuse(key, "an object or null")),
        }
    }

    /// The value under `key` unless absent or null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// Whether `key` holds anything but null.
    pub(super) fn present(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// A key whose value is an object, if there is one: per-layer settings are nested like this.
    pub(super) fn nested_key(&self) -> Option<&'a str> {
        self.object.iter().find(|(_, value)| value.is_object()).map(|(key, _)| key.as_str())
    }

    /// The error for a `key` whose value is absent or not supported.
    pub(super) fn refuse(&self, key: &str, accepted: &str) -> ConfigError {
        let (file, accepted) = (self.file, accepted.to_owned());
        let value = self.get(key);
        let key = match self.parent {
            "" => key.to_owned(),
            parent => format!("{parent}.{key}"),
        };
        match value {
            None => ConfigError::Missing { file, key, accepted },
            Some(value) => ConfigError::Value { file, key, value: shorten(value), accepted },
        }
    }

    /// An integer that must be there.
    pub(super) fn integer(
        &self,
        key: &str,
        range: RangeInclusive<u32>,
    ) -> Result<u32, ConfigError> {
        let accepted = format!("an integer from {} to {}", range.start(), range.end());
        self.optional_integer(key, range)?.ok_or_else(|| self.refuse(key, &accepted))
    }

    /// An integer that may be absent.
    pub(super) fn optional_integer(
        &self,
        key: &str,
        range: RangeInclusive<u32>,
    ) -> Result<Option<u32>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
        match number.filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => {
                let accepted = format!("an integer from {} to {}", range.start(), range.end());
                Err(self.refuse(key, &accepted))
            }
        }
    }

    /// A number inside `range`; integers are numbers too.
    pub(super) fn number(
        &self,
        key: &str,
        range: RangeInclusive<f64>,
    ) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_f64().filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => {
                let accepted = format!("a number from {:e} to {:e}", range.start(), range.end());
                Err(self.refuse(key, &accepted))
            }
        }
    }

    /// A boolean.
    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.refuse(key, "true or false")),
        }
    }

    /// A string.
    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.refuse(key, "a string")),
        }
    }

    /// The first of a list of strings; `None` for an absent or empty list.
    pub(super) fn first_text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => match list.first() {
                None => Ok(None),
                Some(Value::String(text)) => Ok(Some(text)),
                Some(_) => Err(self.refuse(key, "a list of strings")),
            },
            Some(_) => Err(self.refuse(key, "a list of strings")),
        }
    }

    /// How often `text` occurs in a list of strings.
    pub(super) fn count_text(&self, key: &str, text: &str) -> Result<Option<u32>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => {
                let count = list.iter().filter(|item| item.as_str() == Some(text)).count();
                Ok(Some(u32::try_from(count).unwrap_or(u32::MAX)))
            }
            Some(_) => Err(self.refuse(key, "a list of strings")),
        }
    }

    /// A list of integers, if there is one.
    pub(super) fn integers(&self, key: &str) -> Option<Vec<u64>> {
        self.get(key)?.as_array()?.iter().map(Value::as_u64).collect()
    }

    /// A list of strings; empty if absent.
    pub(super) fn texts(&self, key: &str) -> Result<Vec<&'a str>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(Vec::new());
        };
        let texts = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        texts.ok_or_else(|| self.refuse(key, "a list of strings"))
    }

    /// One token id, or a list of them.
    pub(super) fn token_ids(
        &self,
        key: &str,
        vocab_size: u32,
    ) -> Result<Option<Vec<u32>>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let id = |item: &Value| {
            let id = item.as_u64().and_then(|id| u32::try_from(id).ok());
            id.filter(|id| *id < vocab_size)
        };
        let ids: Option<Vec<u32>> = list.iter().map(id).collect();
        match ids.filter(|ids| ids.len() <= EOS_COUNT_MAX) {
            Some(ids) => Ok(Some(ids)),
            None => {
                let accepted = format!(
                    "an id below vocab_size {vocab_size}, or a list of up to {EOS_COUNT_MAX} ids"
                );
                Err(self.refuse(key, &accepted))
            }
        }
    }
}

/// A value as JSON, cut to a length that fits an error message.
fn shorten(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(VALUE_CHARS_MAX) {
        None => text,
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
    }
}

//! Chat templates of Hugging Face checkpoints, rendered by `minijinja`.
//!
//! A template is Jinja written for Python: it calls methods of Python's strings and dictionaries,
//! and a few helpers that its runtime defines. Both are provided here, with the block trimming that
//! the templates are written for.
//!
//! Source: "Chat templates", Hugging Face Transformers documentation.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

const TEMPLATE_NAME: &str = "chat";

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: &str, content: impl Into<String>) -> Message {
        Message { role: role.to_owned(), content: content.into() }
    }
}

/// The parts of `tokenizer_config.json` that a template needs.
#[derive(Debug, Default, Deserialize)]
struct TokenizerConfig {
    chat_template: Option<TemplateField>,
    bos_token: Option<TokenField>,
    eos_token: Option<TokenField>,
    unk_token: Option<TokenField>,
    pad_token: Option<TokenField>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum TemplateField {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum TokenField {
    Text(String),
    Added { content: String },
}

impl TemplateField {
    /// The template called `default`, or the first.
    fn into_source(self) -> Option<String> {
        match self {
            TemplateField::One(source) => Some(source),
            TemplateField::Named(mut named) => {
                let default = named.iter().position(|template| template.name == "default");
                let chosen = default.unwrap_or(0);
                (chosen < named.len()).then(|| named.swap_remove(chosen).template)
            }
        }
    }
}

impl TokenizerConfig {
    /// `bos_token` and its like, as a template sees them.
    fn special_tokens(self) -> BTreeMap<&'static str, String> {
        let fields = [
            ("bos_token", self.bos_token),
            ("eos_token", self.eos_token),
            ("unk_token", self.unk_token),
            ("pad_token", self.pad_token),
        ];
        let text = |field| match field {
            TokenField::Text(text) | TokenField::Added { content: text } => text,
        };
        fields.into_iter().filter_map(|(name, field)| Some((name, text(field?)))).collect()
    }
}

/// Turns a conversation into the text of a prompt.
#[derive(Debug)]
pub struct ChatTemplate {
    path: PathBuf,
    environment: Environment<'static>,
    special_tokens: BTreeMap<&'static str, String>,
}

impl ChatTemplate {
    /// Reads `chat_template.jinja`, or the template in `tokenizer_config.json`; none if there is no
    /// template.
    pub fn load(directory: &Path) -> Result<Option<ChatTemplate>> {
        let config_path = directory.join("tokenizer_config.json");
        let template_path = directory.join("chat_template.jinja");
        let mut config = TokenizerConfig::default();
        if let Some(text) = read_if_present(&config_path)? {
            config = serde_json::from_str(&text).map_err(|error| Error::Tokenizer {
                path: config_path.clone(),
                message: error.to_string(),
            })?;
        }
        let in_config = config.chat_template.take().and_then(TemplateField::into_source);
        let special_tokens = config.special_tokens();
        match (read_if_present(&template_path)?, in_config) {
            (Some(source), _) => {
                ChatTemplate::new(&template_path, &source, special_tokens).map(Some)
            }
            (None, Some(source)) => {
                ChatTemplate::new(&config_path, &source, special_tokens).map(Some)
            }
            (None, None) => Ok(None),
        }
    }

    /// Compiles `source`; `path` names it in errors.
    fn new(
        path: &Path,
        source: &str,
        special_tokens: BTreeMap<&'static str, String>,
    ) -> Result<ChatTemplate> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(TEMPLATE_NAME, without_generation_tags(source))
            .map_err(|error| template_error(path, &error))?;
        Ok(ChatTemplate { path: path.to_owned(), environment, special_tokens })
    }

    /// The prompt for the assistant's answer to `messages`.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let special_tokens = Value::from_serialize(&self.special_tokens);
        let values = context! {
            messages,
            add_generation_prompt => true,
            tools => None::<Value>,
            documents => None::<Value>,
            ..special_tokens
        };
        self.environment
            .get_template(TEMPLATE_NAME)
            .and_then(|template| template.render(values))
            .map_err(|error| template_error(&self.path, &error))
    }
}

fn read_if_present(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::file(path, error)),
    }
}

fn template_error(path: &Path, error: &minijinja::Error) -> Error {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let line = error.line().map(|line| format!("line {line}: ")).unwrap_or_default();
    let message = format!("chat template: {line}{}", what.replace('\n', " "));
    Error::Tokenizer { path: path.to_owned(), message }
}

/// Replaces `{% generation %}` blocks, which mark text for training, by blocks that always run.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(tag_bytes) = rest[start..].find("%}") else {
            break;
        };
        let tag = &rest[start + 2..start + tag_bytes];
        let name = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let end = start + tag_bytes + 2;
        out.push_str(&rest[..start]);
        match name {
            "generation" => out.push_str(&format!("{{%{}%}}", tag.replace(name, "if true"))),
            "endgeneration" => out.push_str(&format!("{{%{}%}}", tag.replace(name, "endif"))),
            _ => out.push_str(&rest[start..end]),
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// `raise_exception(message)`: the template refuses the conversation.
fn raise_exception(message: String) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// `value | tojson(indent=…)` with the spacing of Python's `json.dumps` and no HTML escapes.
fn to_json(value: Value, options: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent = options.get::<Option<usize>>("indent")?;
    // The default of the reference runtime, and the only form written here.
    let ensure_ascii = options.get::<Option<bool>>("ensure_ascii")?;
    options.assert_all_used()?;
    if ensure_ascii == Some(true) {
        let message = "tojson(ensure_ascii=true) is not supported";
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
    }
    let mut json = Vec::new();
    let written = match indent {
        Some(indent) => {
            let spaces = " ".repeat(indent);
            let format = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, format))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, PythonJson)),
    };
    let bad = |error: &dyn std::fmt::Display| {
        minijinja::Error::new(ErrorKind::BadSerialization, error.to_string())
    };
    written.map_err(|error| bad(&error))?;
    String::from_utf8(json).map_err(|error| bad(&error))
}

/// One line, with a space after each comma and colon.
struct PythonJson;

impl serde_json::ser::Formatter for PythonJson {
    fn begin_array_value<W>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()>
    where
        W: ?Sized + std::io::Write,
    {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()>
    where
        W: ?Sized + std::io::Write,
    {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W>(&mut self, writer: &mut W) -> std::io::Result<()>
    where
        W: ?Sized + std::io::Write,
    {
        writer.write_all(b": ")
    }
}

/// `strftime_now(format)`: the present time, in UTC.
fn strftime_now(format: &str) -> std::result::Result<String, minijinja::Error> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    strftime(format, now.as_secs())
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
/// The first of January 1970 was a Thursday.
const WEEKDAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// Formats a time in seconds since 1970 by the codes that templates use.
fn strftime(format: &str, unix_s: u64) -> std::result::Result<String, minijinja::Error> {
    let (days, second) = (unix_s / 86_400, unix_s % 86_400);
    let (year, month, day) = civil_date(days);
    let month_name = MONTHS[month as usize - 1];
    let weekday = WEEKDAYS[(days % 7) as usize];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('y') => out.push_str(&format!("{:02}", year % 100)),
            Some('Y') => out.push_str(&year.to_string()),
            Some('b') => out.push_str(&month_name[..3]),
            Some('B') => out.push_str(month_name),
            Some('a') => out.push_str(&weekday[..3]),
            Some('A') => out.push_str(weekday),
            Some('H') => out.push_str(&format!("{:02}", second / 3600)),
            Some('M') => out.push_str(&format!("{:02}", second / 60 % 60)),
            Some('S') => out.push_str(&format!("{:02}", second % 60)),
            Some('%') => out.push('%'),
            other => {
                let code = other.map(String::from).unwrap_or_default();
                let message = format!("strftime_now does not know %{code}");
                return Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
            }
        }
    }
    Ok(out)
}

/// Year, month and day (both from 1) of a day counted from the first of January 1970.
fn civil_date(days: u64) -> (u64, u64, u64) {
    // 400 years of the Gregorian calendar repeat. Counting from March puts the leap day last; the
    // months from March on have 31 30 31 30 31 days, twice, which (153 m + 2) / 5 adds up.
    let since_march_0000 = days + 719_468;
    let (era, day_of_era) = (since_march_0000 / 146_097, since_march_0000 % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (400 * era + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        let tokens = BTreeMap::from([("bos_token", "<s>".to_owned())]);
        ChatTemplate::new(Path::new("t.jinja"), source, tokens).unwrap()
    }

    fn talk() -> Vec<Message> {
        vec![Message::new("system", "Be brief."), Message::new("user", " Hi <there> ")]
    }

    #[test]
    fn a_chat_with_python_methods_and_trimmed_blocks() {
        let source = "{{ bos_token }}{% for message in messages %}
    {% if message['role'].startswith('sys') %}
[{{ message.content.strip() | upper }}]
    {% elif loop.last %}
{{ '<|' + message['role'] + '|>' + message['content'].split('<')[0].rstrip() }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt and tools is none %}
<|assistant|>{% endif %}
";
        let text = template(source).render(&talk()).unwrap();
        assert_eq!(text, "<s>[BE BRIEF.]\n<|user|> Hi\n<|assistant|>");
    }

    #[test]
    fn loop_controls_slices_and_generation_blocks() {
        let source = "{%- for m in messages[::-1] %}{% if m.role == 'system' %}{% break %}\
                      {% endif %}{%- generation -%} {{ m.content }} {%- endgeneration -%}\
                      {% endfor %}{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}";
        assert_eq!(template(source).render(&talk()).unwrap(), " Hi <there> 2");
    }

    #[test]
    fn json_is_spaced_like_python_and_not_escaped() {
        let source = "{{ messages | tojson }}|{{ {'a': [1, true, none]} | tojson(indent=2) }}";
        let text = template(source).render(&talk()[1..]).unwrap();
        let want = "[{\"role\": \"user\", \"content\": \" Hi <there> \"}]|\
                    {\n  \"a\": [\n    1,\n    true,\n    null\n  ]\n}";
        assert_eq!(text, want);
    }

    #[test]
    fn a_refusal_names_the_file_and_the_reason() {
        let refusing = template("{{ raise_exception('roles must\nalternate') }}");
        let error = refusing.render(&talk()).unwrap_err().to_string();
        assert_eq!(error, "t.jinja: chat template: line 1: roles must alternate");
        let broken = ChatTemplate::new(Path::new("b"), "{% if %}", BTreeMap::new());
        let error = broken.unwrap_err().to_string();
        assert!(
            error.starts_with("b: chat template: line 1: ") && !error.contains('\n'),
            "{error}"
        );
    }

    #[test]
    fn template_files_in_all_forms() {
        let dir = tempfile::tempdir().unwrap();
        assert!(ChatTemplate::load(dir.path()).unwrap().is_none());
        let config = dir.path().join("tokenizer_config.json");
        let render = || ChatTemplate::load(dir.path()).unwrap().unwrap().render(&[]).unwrap();

        std::fs::write(
            &config,
            r#"{"eos_token": {"content": "</s>"}, "bos_token": null,
                                    "chat_template": "one {{ eos_token }}"}"#,
        )
        .unwrap();
        assert_eq!(render(), "one </s>");
        std::fs::write(
            &config,
            r#"{"bos_token": "B", "chat_template": [
            {"name": "tool_use", "template": "x"},
            {"name": "default", "template": "d {{ bos_token }}"}]}"#,
        )
        .unwrap();
        assert_eq!(render(), "d B");
        std::fs::write(dir.path().join("chat_template.jinja"), "file {{ bos_token }}").unwrap();
        assert_eq!(render(), "file B");
        std::fs::write(&config, "{").unwrap();
        assert!(ChatTemplate::load(dir.path()).is_err());
    }

    #[test]
    fn dates() {
        let date = |unix_s| strftime("%d %b %Y %A %H:%M:%S %m %y %B %a 100%%", unix_s).unwrap();
        assert_eq!(date(0), "01 Jan 1970 Thursday 00:00:00 01 70 January Thu 100%");
        assert_eq!(date(951_825_599), "29 Feb 2000 Tuesday 11:59:59 02 00 February Tue 100%");
        assert_eq!(date(1_767_225_599), "31 Dec 2025 Wednesday 23:59:59 12 25 December Wed 100%");
        assert_eq!(date(4_107_542_400), "01 Mar 2100 Monday 00:00:00 03 00 March Mon 100%");
        assert!(strftime("%Q", 0).is_err());
        assert!(strftime("%", 0).is_err());
        assert_eq!(strftime_now("%%").unwrap(), "%");
    }
}

//! `model.safetensors.index.json`: which tensor is in which file of a sharded checkpoint.

use super::error::{LoadError, shorten};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

/// Most files of one checkpoint; each costs one mapping.
const SHARD_COUNT_MAX: usize = 4096;

/// The part of the file that matters.
#[derive(Deserialize)]
struct Index {
    /// Tensor to file name.
    weight_map: BTreeMap<String, String>,
}

/// The tensors of each file, by file name.
///
/// Errors:  `Index`, also for a name that is not a plain file name in the same directory.
pub(super) fn parse(
    path: &Path,
    text: &str,
) -> Result<BTreeMap<String, BTreeSet<String>>, LoadError> {
    let refuse = |reason: String| LoadError::Index { path: path.to_owned(), reason };
    let index: Index = serde_json::from_str(text).map_err(|error| refuse(error.to_string()))?;
    let mut files: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (name, file_name) in index.weight_map {
        if !is_plain(&file_name) {
            let (name, file_name) = (shorten(&name), shorten(&file_name));
            let accepted = "only names of files in the same directory are accepted";
            return Err(refuse(format!("tensor `{name}` is in `{file_name}`; {accepted}")));
        }
        files.entry(file_name).or_default().insert(name);
    }
    if files.is_empty() || files.len() > SHARD_COUNT_MAX {
        let count = files.len();
        return Err(refuse(format!("it names {count} files, not 1 to {SHARD_COUNT_MAX}")));
    }
    Ok(files)
}

/// Whether a name is one ordinary path component on every operating system.
fn is_plain(file_name: &str) -> bool {
    let mut components = Path::new(file_name).components();
    let single = matches!(
        (components.next(), components.next()),
        (Some(Component::Normal(name)), None) if name == file_name
    );
    single && !file_name.contains(['/', '\\', ':', '\0'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_are_accepted() {
        for good in ["model-00001-of-00002.safetensors", "a", "..a", ".hidden"] {
            assert!(is_plain(good), "{good}");
        }
        for bad in ["", ".", "..", "../a", "a/b", "/a", "a/", "./a", "a\\b", "C:a", "a\0b", "a/.."]
        {
            assert!(!is_plain(bad), "{bad:?}");
        }
    }

    #[test]
    fn tensors_are_grouped_by_file() {
        let text =
            r#"{"metadata": {"total_size": 1}, "weight_map": {"x": "b", "y": "a", "z": "b"}}"#;
        let files = parse(Path::new("index"), text).unwrap();
        let names = |file: &str| files[file].iter().cloned().collect::<Vec<_>>();
        assert_eq!((names("a"), names("b")), (vec!["y".into()], vec!["x".into(), "z".into()]));
    }

    #[test]
    fn errors_are_one_line() {
        let message = |text: &str| parse(Path::new("index"), text).unwrap_err().to_string();
        assert!(message("{").starts_with("index is not a usable index: "));
        assert!(message("{}").contains("missing field `weight_map`"));
        assert!(message(r#"{"weight_map": {}}"#).contains("names 0 files"));
        let escape = message(r#"{"weight_map": {"x": "../\n../etc/passwd"}}"#);
        assert!(escape.contains(r"tensor `x` is in `../\n../etc/passwd`"), "{escape}");
    }
}

//! Figures of two runs beside each other.

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};

/// The list of single rounds, which are not figures of their own.
const ROUNDS: &str = "rounds";

/// The figures in a file, which must be those of `bench`.
///
/// Errors: a file that cannot be read, is no JSON, or is of another subcommand.
pub(super) fn read_old(path: &Path, bench: &str) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::file(path, error))?;
    let old: Value =
        serde_json::from_str(&text).map_err(|error| Error::file(path, error.into()))?;
    match old.get("bench").and_then(Value::as_str) {
        Some(made_by) if made_by == bench => Ok(old),
        made_by => {
            let made_by = made_by.map_or("no bench".into(), |name| format!("`bench {name}`"));
            let path = path.display();
            Err(Error::Usage(format!("{path}: figures of {made_by}, not of `bench {bench}`")))
        }
    }
}

/// A line for each figure of either run: old, new, and new over old.
pub(super) fn comparison(old: &Value, new: &Value) -> String {
    let (old, new) = (leaves(old), leaves(new));
    let find = |all: &[(String, f64)], name: &str| {
        all.iter().find(|(other, _)| other == name).map(|(_, value)| *value)
    };
    let mut rows = vec![["", "old", "new", "new/old"].map(str::to_owned)];
    for (name, value) in &new {
        rows.push(match find(&old, name) {
            Some(before) => {
                let ratio = if before == 0.0 { "-".into() } else { number(value / before) };
                [name.clone(), number(before), number(*value), ratio]
            }
            None => [name.clone(), "-".into(), number(*value), "-".into()],
        });
    }
    for (name, value) in old.iter().filter(|(name, _)| find(&new, name).is_none()) {
        rows.push([name.clone(), number(*value), "-".into(), "-".into()]);
    }
    aligned(&rows)
}

/// All numbers with the paths to them. Rows with a name are called by it.
fn leaves(value: &Value) -> Vec<(String, f64)> {
    let mut found = Vec::new();
    visit(value, "", &mut found);
    found
}

fn visit(value: &Value, path: &str, found: &mut Vec<(String, f64)>) {
    let below = |key: &str| if path.is_empty() { key.into() } else { format!("{path}.{key}") };
    match value {
        Value::Number(number) => found.extend(number.as_f64().map(|n| (path.to_owned(), n))),
        Value::Object(fields) => {
            for (key, value) in fields.iter().filter(|(key, _)| *key != ROUNDS) {
                visit(value, &below(key), found);
            }
        }
        Value::Array(items) => {
            for (idx, item) in items.iter().enumerate() {
                let name = item.get("name").and_then(Value::as_str);
                visit(item, &below(name.unwrap_or(&idx.to_string())), found);
            }
        }
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

/// A number with four significant digits, or all digits of a whole one.
fn number(value: f64) -> String {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        return format!("{value:.0}");
    }
    let whole_digits = value.abs().log10().floor() as i32 + 1;
    format!("{value:.*}", (4 - whole_digits).clamp(0, 9) as usize)
}

/// Rows with aligned columns: the first to the left, numbers to the right.
fn aligned(rows: &[[String; 4]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths = [0, 1, 2, 3].map(|column| width(column).unwrap_or(0));
    let line = |[name, old, new, ratio]: &[String; 4]| {
        let [w0, w1, w2, w3] = widths;
        format!("{name:w0$}  {old:>w1$}  {new:>w2$}  {ratio:>w3$}\n")
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn figures_are_matched_by_path_and_name() {
        let old = json!({"bench": "x", "tpot_us": {"p50": 10.0, "max": null}, "rounds": [1, 2],
                         "rows": [{"name": "b", "ns": 4}, {"name": "a", "ns": 8}], "gone": 1.5});
        let new = json!({"bench": "x", "tpot_us": {"p50": 12.5}, "rounds": [3],
                         "rows": [{"name": "a", "ns": 4}, {"name": "c", "ns": 1}]});
        let table = comparison(&old, &new);
        let rows: Vec<Vec<&str>> =
            table.lines().map(|line| line.split_whitespace().collect()).collect();
        let want = [
            &["old", "new", "new/old"][..],
            &["rows.a.ns", "8", "4", "0.5000"],
            &["rows.c.ns", "-", "1", "-"],
            &["tpot_us.p50", "10", "12.50", "1.250"],
            &["gone", "1.500", "-", "-"],
            &["rows.b.ns", "4", "-", "-"],
        ];
        assert_eq!(rows, want);
    }

    #[test]
    fn a_file_of_another_bench_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, r#"{"bench": "prefill"}"#).unwrap();
        let message = read_old(file.path(), "decode").unwrap_err().to_string();
        assert!(message.contains("`bench prefill`, not of `bench decode`"), "{message}");
        std::fs::write(&file, r#"{"tokens": 3}"#).unwrap();
        assert!(read_old(file.path(), "decode").unwrap_err().to_string().contains("no bench"));
        std::fs::write(&file, "{").unwrap();
        assert!(matches!(read_old(file.path(), "decode"), Err(Error::File { .. })));
    }

    #[test]
    fn numbers_keep_four_digits() {
        let shown = [0.0, 3.0, 1234.56, 12.345, 0.012_345, 1e18].map(number);
        assert_eq!(shown, ["0", "3", "1235", "12.35", "0.01235", "1000000000000000000"]);
    }
}

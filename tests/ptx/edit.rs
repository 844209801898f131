//! Edits of PTX text.
//!
//! Compilers change registers, labels and the order of instructions, so places are found by the
//! statements that `device/machine/nvptx` writes as inline assembly, and by what defines the values
//! that they use.

/// The text with each line that `edit` has an answer for replaced by it.
pub(crate) fn lines(text: &str, edit: impl Fn(&str) -> Option<String>) -> String {
    let lines = text.lines().map(|line| edit(line).unwrap_or_else(|| line.to_owned()) + "\n");
    lines.collect()
}

/// The text with `edit` applied to the function of the device crate called `name`.
pub(crate) fn function(text: &str, name: &str, edit: impl Fn(&str) -> String) -> String {
    // In Rust's mangled names, the length of a name precedes it.
    let mangled = format!("{}{name}(", name.len());
    let is_head = |line: &str| {
        line.starts_with(".func") && line.contains(&mangled)
            || line.starts_with(".visible .entry") && line.contains(&format!(" {name}("))
    };
    let head = text.lines().find(|line| is_head(line)).expect("the function is in the PTX");
    let first = text.find(head).expect("the line is from the text");
    let len = text[first..].find("\n}\n").expect("the function has an end");
    format!("{}{}{}", &text[..first], edit(&text[first..first + len]), &text[first + len..])
}

/// What is between `open` and `close`, in the first place after `after`.
pub(crate) fn between<'a>(line: &'a str, after: &str, open: &str, close: &str) -> Option<&'a str> {
    let rest = &line[line.find(after)? + after.len()..];
    let rest = &rest[rest.find(open)? + open.len()..];
    Some(rest[..rest.find(close)?].trim())
}

/// The operands of an instruction, in order.
pub(crate) fn operands(line: &str) -> Vec<&str> {
    let rest = line.trim().split_once(char::is_whitespace).map_or("", |(_, rest)| rest);
    rest.trim_end_matches(';').split(',').map(str::trim).collect()
}

/// Whether the line is a load that writes `register`, alone or in a vector.
pub(crate) fn loads(line: &str, register: &str) -> bool {
    let Some((targets, _)) = line.trim().split_once('[') else { return false };
    let mut words = targets.split(|c: char| c.is_whitespace() || ",{}".contains(c));
    targets.starts_with("ld.") && words.any(|word| word == register)
}

#[test]
fn places_are_found() {
    let text =
        ".func _R4pack(\n)\n{\n add.s32 \t%r1, %r2, 3;\n}\n\n.func _R6unpack(\n)\n{\n x;\n}\n";
    let edited = function(text, "pack", |body| body.replace("%r2", "%r9"));
    assert_eq!(edited, text.replace("%r2", "%r9"));
    let edited = function(text, "unpack", |body| body.replace("x;", "y;"));
    assert_eq!(edited, text.replace("x;", "y;"));
    assert_eq!(operands("\tadd.s32 \t%r1, %r2, 3;"), ["%r1", "%r2", "3"]);
    assert_eq!(between("a [%r1], %r2; }", "a ", "[", "]"), Some("%r1"));
    assert!(loads("\tld.v2.b32 \t{%r1, %r12}, [%rd1+8];", "%r12"));
    assert!(!loads("\tld.b32 \t%r12, [%rd1+8];", "%r1"));
    assert!(!loads("\tst.b32 \t[%rd1+8], %r1;", "%r1"));
}

//! Damaged PTX gives an error or a module, never a panic.

use proptest::prelude::*;
use ptxvm::Module;

fn texts() -> Vec<String> {
    let dir = format!("{}/kernels", env!("CARGO_MANIFEST_DIR"));
    let files = std::fs::read_dir(dir).unwrap().map(|f| f.unwrap().path());
    files
        .filter(|p| p.extension().is_some_and(|e| e == "ptx"))
        .map(|p| {
            // Without debug sections, so that damage hits instructions.
            let text = std::fs::read_to_string(p).unwrap();
            text.lines()
                .filter(|l| !l.trim_start().starts_with(".b8"))
                .collect::<Vec<_>>()
                .join("\n")
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damaged_text(file in 0usize..64, cuts in prop::collection::vec((any::<u32>(), 0usize..6), 1..6)) {
        let texts = texts();
        let mut bytes = texts[file % texts.len()].clone().into_bytes();
        for (at, len) in cuts {
            let at = at as usize % bytes.len();
            let end = (at + len).min(bytes.len());
            let moved: Vec<u8> = bytes[at..end].to_vec();
            bytes.drain(at..end);
            let to = (at * 7 + 13) % bytes.len();
            bytes.splice(to..to, moved);
        }
        let _ = Module::parse(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn truncated_text(file in 0usize..64, at in any::<u32>()) {
        let texts = texts();
        let text = &texts[file % texts.len()];
        let _ = Module::parse(&text[..at as usize % text.len()]);
    }
}

#[test]
fn absurd_sizes_are_refused() {
    let error = |body: &str| {
        let text = format!(
            ".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry k() {{\n{body}\n}}"
        );
        let e = Module::parse(&text).unwrap_err();
        assert_eq!(e.line, 5, "{e}");
        e.message
    };
    assert!(error(".reg .b32 %r<4000000000>;").contains("registers"));
    assert!(error(".local .b8 x[99999999999999];").contains("too large"));
    assert!(error(".shared .b8 x[99999999][99999999];").contains("too large"));
    assert!(error(".reg .b64 a; mov.b64 {}, a;").contains("empty"));
    assert!(error(".reg .b64 a; .local .align 3 .b8 x[4];").contains("alignment"));
}

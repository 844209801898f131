//! Random files: never a panic, and the same verdict as the `safetensors` crate.

use super::header;
use super::tests::{file, good_file, tensor};
use proptest::prelude::*;
use safetensors::SafeTensors;
use std::path::Path;

/// Parses, and asserts what `parse` promises and that the other reader agrees.
fn check(bytes: &[u8]) {
    let ours = header::parse(Path::new("file"), bytes);
    let theirs = SafeTensors::deserialize(bytes);
    if let Err(error) = &ours
        && theirs.is_ok()
    {
        // The crate takes the last of two descriptions; nothing good can come of that.
        assert!(error.to_string().contains("described twice"), "{error}");
    }
    for (name, entry) in ours.unwrap_or_default() {
        let view = theirs.as_ref().unwrap().tensor(&name).unwrap();
        assert_eq!(&bytes[entry.range], view.data(), "{name}");
        assert!(entry.shape.iter().map(|axis| *axis as usize).eq(view.shape().iter().copied()));
        assert_eq!(entry.stored_dtype, view.dtype(), "{name}");
    }
}

/// A few tensors that mostly, not always, follow each other.
fn any_header() -> impl Strategy<Value = String> {
    let dtype = prop::sample::select(&["F32", "BF16", "F16", "I64", "F4", "F8_E4M3", "Q4"][..]);
    let item = ("[ab]{1,2}", dtype, prop::collection::vec(0u64..5, 0..3), 0u64..8);
    prop::collection::vec(item, 0..5).prop_map(|items| {
        let mut end = 0;
        let text = items.into_iter().map(|(name, dtype, shape, shift)| {
            let bits = match dtype {
                "F32" => 32,
                "I64" => 64,
                "F4" => 4,
                "F8_E4M3" => 8,
                _ => 16,
            };
            let start = end + shift.saturating_sub(6);
            end = start + shape.iter().product::<u64>() * bits / 8;
            tensor(&name, dtype, &shape, [start, end])
        });
        format!("{{{}}}", text.collect::<Vec<_>>().join(","))
    })
}

proptest! {
    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        check(&bytes);
    }

    #[test]
    fn any_header_text(text in ".{0,100}", data in prop::collection::vec(any::<u8>(), 0..20)) {
        check(&file(&text, &data));
    }

    #[test]
    fn any_list_of_tensors(text in any_header(), extra in 0usize..2) {
        let length = match header::parse(Path::new("file"), &file(&text, &[])) {
            Ok(_) => 0,
            Err(_) => 400,
        };
        check(&file(&text, &vec![0; length + extra]));
        // Every length of data, so that the right one is among them.
        for length in 0..200 {
            check(&file(&text, &vec![0; length]));
        }
    }

    #[test]
    fn mutated_files(position in 0usize..250, byte: u8, cut in 0usize..250) {
        let mut bytes = good_file();
        if let Some(target) = bytes.get_mut(position) {
            *target = byte;
        }
        check(&bytes);
        bytes.truncate(cut);
        check(&bytes);
    }

    #[test]
    fn mutated_numbers(from in 0usize..8, to in any::<u64>()) {
        let text = String::from_utf8(good_file().split_off(8)).unwrap();
        let (text, _) = text.split_at(text.rfind('}').unwrap() + 1);
        let numbers: Vec<_> = text.match_indices(char::is_numeric).collect();
        let (at, old) = numbers[from % numbers.len()];
        let text = format!("{}{to}{}", &text[..at], &text[at + old.len()..]);
        check(&file(&text, &[0; 32]));
    }
}

//! The shipped PTX against logits and greedy tokens that `transformers` computed in f32.

use safetensors::SafeTensors;
use serde_json::Value;

use super::{golden_folder, run_ptx, shipped};

const FAMILIES: [&str; 4] = ["llama", "smollm2", "qwen3", "qwen3_yarn"];
/// Largest difference of logits from the reference.
const TOLERANCE: f32 = 1e-4;

/// What is asked of a golden checkpoint, and what the answer is.
struct Golden {
    family: &'static str,
    folder: String,
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    /// Logits of each position of the prompt, then of each generated token that was fed back.
    logits: Vec<f32>,
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("a list of ids")
}

impl Golden {
    /// Both variants of a family: weights in f32 and in bf16.
    fn read(family: &'static str) -> Vec<Golden> {
        let path = golden_folder(family);
        let text = std::fs::read_to_string(path.join("golden.json")).expect("golden.json");
        let golden: Value = serde_json::from_str(&text).expect("JSON");
        let bytes = std::fs::read(path.join("golden.safetensors")).expect("the logits");
        let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
        let rows = |name: &str, first_row: usize| {
            let view = tensors.tensor(name).expect("the variant's logits");
            let (words, _) = view.data().as_chunks::<4>();
            let values = words.iter().map(|word| f32::from_le_bytes(*word));
            values.skip(first_row * view.shape()[1]).collect::<Vec<_>>()
        };
        let variants = golden["variants"].as_array().expect("variants").iter();
        let variant = |variant: &Value| {
            let name = variant["name"].as_str().expect("a name");
            // The first row of those after the prompt is the prompt's last.
            let generated = rows(&format!("{name}.gen_logits"), 1);
            Golden {
                family,
                folder: variant["dir"].as_str().expect("a folder").to_owned(),
                prompt: ids(&golden["prompt"]),
                greedy: ids(&variant["greedy"]),
                logits: [rows(&format!("{name}.logits"), 0), generated].concat(),
            }
        };
        variants.map(variant).collect()
    }

    /// Prompt and greedy tokens by the PTX for `capability`, in steps of `width` tokens at most.
    fn check(&self, capability: u32, workers: u32, width: u32) {
        let what = format!("{} {}, sm_{capability}, {workers} workers", self.family, self.folder);
        let options = shipped(capability, workers, 11);
        let checkpoint = [self.family, &self.folder];
        let found = run_ptx(checkpoint, options, width, &self.prompt, self.greedy.len() as u32);
        assert_eq!(found.ids, self.greedy, "{what}");
        let rows = found.rows.concat();
        assert!(rows.len() <= self.logits.len(), "{what}");
        assert_eq!(found.rows.len(), self.prompt.len() + self.greedy.len() - 1, "{what}");
        let differences = rows.iter().zip(&self.logits).map(|(a, b)| (a - b).abs());
        // A difference that is not a number is the largest.
        let worst = differences.max_by(f32::total_cmp).expect("there are logits");
        println!("{what}: {worst:e}");
        assert!(worst <= TOLERANCE, "{what}: {worst:e}");
    }
}

#[test]
fn every_family_and_format_gives_the_golden_tokens() {
    for (idx, golden) in FAMILIES.into_iter().flat_map(Golden::read).enumerate() {
        golden.check(90, [1, 2, 5][idx % 3], 8);
        golden.check(80, [2, 5, 1][idx % 3], 8);
    }
}

#[test]
#[ignore = "takes minutes: scripts/test runs a part"]
fn every_family_gives_the_golden_tokens_on_all_worker_counts() {
    for golden in FAMILIES.into_iter().flat_map(Golden::read) {
        for (capability, workers) in [90, 80].into_iter().flat_map(|c| [1, 2, 5].map(|w| (c, w))) {
            for width in [1, 8] {
                golden.check(capability, workers, width);
            }
        }
    }
}

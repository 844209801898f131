//! One request under many schedules: the bits stay, and nothing is found.

use super::{Output, PROMPT, run_ptx, shipped};

/// Schedules of a usual run.
const SEED_COUNT: u64 = 12;
/// Schedules that `--ignored` asks for.
const SEED_COUNT_MANY: u64 = 200;

/// The smallest golden model: a step of two tokens, then two of one.
fn request(seed: u64) -> Output {
    run_ptx(["llama", "bf16"], shipped(90, 2, seed), 2, &PROMPT[..3], 2)
}

fn same_bits_under(seed_count: u64) {
    let expected = request(0);
    assert_eq!(expected.ids.len(), 2);
    for seed in 1..seed_count {
        let found = request(seed);
        assert!(found.is_same(&expected), "the logits of seed {seed} differ from those of seed 0");
    }
}

#[test]
fn some_seeds_give_the_same_bits() {
    same_bits_under(SEED_COUNT);
}

#[test]
#[ignore = "takes minutes: scripts/test runs fewer seeds"]
fn two_hundred_seeds_give_the_same_bits() {
    same_bits_under(SEED_COUNT_MANY);
}

//! What sequences must not notice of each other.

use std::path::Path;
use std::time::{Duration, Instant};

use safetensors::SafeTensors;
use tilert_mk::engine::{Event, FinishReason};
use tilert_mk::error::Error;
use tilert_mk_shared::sample::SamplingParams;

use crate::play::{Answer, Plan, alone, checkpoint, open, play};

const FAMILIES: [&str; 4] = ["llama/bf16", "smollm2/f32", "qwen3/bf16", "qwen3_yarn/f32"];

/// Sampling that uses every filter and penalty.
fn varied(seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: 0.9,
        top_k: 40,
        top_p: 0.95,
        min_p: 0.01,
        repetition_penalty: 1.1,
        frequency_penalty: 0.1,
        presence_penalty: 0.2,
        seed,
        ..SamplingParams::GREEDY
    }
}

/// Three others: of other lengths, sampled in other ways, begun later, one given up.
fn company() -> [Plan; 3] {
    [
        Plan { sampling: varied(1), starts_at: 5, ..Plan::new(1, 70, 9) },
        Plan { starts_at: 21, cancelled_at: Some(4), ..Plan::new(2, 3, 100) },
        Plan { sampling: varied(2), starts_at: 0, want_logits: false, ..Plan::new(3, 33, 60) },
    ]
}

#[test]
fn a_sequence_is_the_same_in_any_company() {
    for family in FAMILIES {
        let path = checkpoint(family);
        let [greedy, sampled] = [SamplingParams::GREEDY, varied(7)]
            .map(|s| Plan { sampling: s, ..Plan::new(0, 18, 24) });
        for plan in [greedy, sampled] {
            let expected = alone(&path, &plan);
            assert_eq!((expected.ids.len(), expected.rows.len()), (24, 18 + 23));
            for (workers, step_tokens) in [(1, 64), (2, 64), (2, 4), (3, 7)] {
                let mut engine = open(&path, workers, 4, step_tokens);
                let what = format!("{family}, {workers} workers, steps of {step_tokens}");
                let found = play(&mut engine, 4, &[plan.clone(), Plan::new(9, 11, 30)]);
                assert!(found[0] == expected, "{what}: beside one");
                let [a, b, c] = company();
                let found = play(&mut engine, 4, &[a, b, plan.clone(), c]);
                assert!(found[2] == expected, "{what}: beside three");
                assert_eq!(found[1].end, Some(FinishReason::Cancelled), "{what}");
                let found = play(&mut engine, 4, std::slice::from_ref(&plan));
                assert!(found[0] == expected, "{what}: alone again");
            }
        }
    }
}

/// The row is in memory that the next step fills again, for whoever still runs.
#[test]
fn the_last_logits_of_a_sequence_wait_for_a_slow_host() {
    let path = checkpoint("qwen3/bf16");
    let plan = Plan::new(1, 4, 6);
    let expected = alone(&path, &plan);
    let mut engine = open(&path, 2, 2, 8);
    let slot = engine.submit(&plan.request()).expect("a free slot");
    let other = Plan { want_logits: false, ..Plan::new(2, 4, 200) };
    let _ = engine.submit(&other.request()).expect("a free slot");
    let mut found = Answer::default();
    while found.end.is_none() {
        std::thread::sleep(Duration::from_millis(2));
        let mut take = |from, event: Event<'_>| {
            if from == slot {
                found.take(event);
            }
        };
        let _ = engine.poll(&mut take).expect("the device runs");
    }
    assert!(found == expected);
}

#[test]
fn slots_are_used_again() {
    let path = checkpoint("qwen3/bf16");
    let plans: Vec<Plan> = (0..12)
        .map(|key| Plan {
            sampling: if key % 2 == 0 { SamplingParams::GREEDY } else { varied(key.into()) },
            ..Plan::new(key, 2 + key * 13 % 90, 5 + key * 7 % 20)
        })
        .collect();
    let expected: Vec<_> = plans.iter().map(|plan| alone(&path, plan)).collect();
    let mut engine = open(&path, 2, 3, 16);
    for round in 0..3 {
        let found = play(&mut engine, 3, &plans);
        for (idx, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!(found == expected, "round {round}: sequence {idx} differs");
        }
    }
}

#[test]
fn a_submission_with_all_slots_busy_is_an_error_and_no_harm() {
    let path = checkpoint("llama/bf16");
    let plans = [Plan::new(1, 20, 100), Plan::new(2, 8, 100)];
    let expected: Vec<_> = plans.iter().map(|plan| alone(&path, plan)).collect();
    let mut engine = open(&path, 2, 2, 64);
    let slots: Vec<u32> =
        plans.iter().map(|plan| engine.submit(&plan.request()).expect("a free slot")).collect();
    for _ in 0..50 {
        match engine.submit(&Plan::new(3, 4, 4).request()) {
            Err(Error::Request(message)) => assert!(message.contains("busy"), "{message}"),
            _ => panic!("a third request in two slots"),
        }
    }
    let mut ids = [Vec::new(), Vec::new()];
    let mut end_count = 0;
    while end_count < 2 {
        let _ = engine
            .poll(&mut |slot, event| match event {
                Event::Token { id, .. } => {
                    let idx = slots.iter().position(|s| *s == slot).expect("a submitted slot");
                    ids[idx].push(id);
                }
                Event::End(reason) => {
                    assert_eq!(reason, FinishReason::Length);
                    end_count += 1;
                }
                _ => {}
            })
            .expect("the device runs");
    }
    assert_eq!(ids, [expected[0].ids.clone(), expected[1].ids.clone()]);
    assert!(play(&mut engine, 2, &plans) == expected, "the engine goes on");
}

#[test]
fn any_number_of_commands_finds_room() {
    let path = checkpoint("llama/bf16");
    let plan = Plan::new(4, 8, 8);
    let expected = alone(&path, &plan);
    let mut engine = open(&path, 2, 1, 64);
    for _ in 0..20 {
        let slot = engine.submit(&plan.request()).expect("a free slot");
        // Far more than the ring of commands holds.
        (0..500).for_each(|_| engine.cancel(slot));
        let (begin, mut end) = (Instant::now(), None);
        while end.is_none() {
            assert!(begin.elapsed().as_secs() < 20, "the start was lost");
            let _ = engine.poll(&mut |_, event| {
                if let Event::End(reason) = event {
                    end = Some(reason);
                }
            });
        }
        assert_eq!(end, Some(FinishReason::Cancelled));
        assert!(play(&mut engine, 1, std::slice::from_ref(&plan))[0] == expected);
    }
}

/// A copy of a checkpoint of f32 in which a token's embedding is not a number.
fn poisoned(from: &Path, folder: &Path, token: usize) {
    let _ = std::fs::copy(from.join("config.json"), folder.join("config.json")).expect("a copy");
    let mut bytes = std::fs::read(from.join("model.safetensors")).expect("a golden file");
    let first = {
        let file = SafeTensors::deserialize(&bytes).expect("a checkpoint");
        let table = file.tensor("model.embed_tokens.weight").expect("an embedding");
        let row_bytes = table.shape()[1] * 4;
        table.data().as_ptr().addr() - bytes.as_ptr().addr() + token * row_bytes
    };
    bytes[first..first + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(folder.join("model.safetensors"), bytes).expect("a writable folder");
}

#[test]
fn logits_that_are_not_numbers_end_their_own_request_only() {
    // Its head is not tied to the embedding, so only sequences with the token are poisoned.
    let path = checkpoint("llama/f32");
    let clean = [Plan::new(1, 20, 40), Plan { sampling: varied(3), ..Plan::new(2, 9, 40) }];
    let expected: Vec<_> = clean.iter().map(|plan| alone(&path, plan)).collect();
    let all = |token: &u32| {
        clean.iter().any(|plan| plan.prompt.contains(token))
            || expected.iter().any(|answer| answer.ids.contains(token))
    };
    let token = (3..256).find(|token| !all(token)).expect("a token that no sequence has");
    let folder = tempfile::tempdir().expect("a temporary folder");
    poisoned(&path, folder.path(), token as usize);
    let mut engine = open(folder.path(), 2, 3, 8);
    let prompt = vec![5, token, 9];
    for want_logits in [false, true] {
        let bad = Plan { prompt: prompt.clone(), want_logits, ..Plan::new(0, 3, 40) };
        let mut plans = vec![bad.clone(), clean[0].clone(), bad.clone(), clean[1].clone()];
        plans.push(Plan { starts_at: 30, ..bad });
        let found = play(&mut engine, 3, &plans);
        for idx in [0, 2, 4] {
            assert_eq!(found[idx].end, Some(FinishReason::NotANumber { position: 2 }));
            assert!(found[idx].ids.is_empty());
        }
        assert!(found[1] == expected[0] && found[3] == expected[1], "{want_logits}");
        // The slots whose caches have seen values that are not numbers serve others as before.
        let again = [clean[0].clone(), clean[1].clone(), clean[0].clone()];
        let found = play(&mut engine, 3, &again);
        assert!(found[0] == expected[0] && found[1] == expected[1] && found[2] == expected[0]);
    }
}

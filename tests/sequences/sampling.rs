//! How tokens are chosen.

use tilert_mk_model::reference::argmax;
use tilert_mk_shared::sample::SamplingParams;

use crate::play::{Answer, Plan, alone, checkpoint, open, play};

const MODEL: &str = "qwen3/bf16";
const GREEDY: SamplingParams = SamplingParams::GREEDY;

fn tokens(sampling: SamplingParams) -> Answer {
    alone(&checkpoint(MODEL), &Plan { sampling, ..Plan::new(1, 12, 60) })
}

#[test]
fn a_seed_gives_the_same_tokens_with_any_number_of_workers() {
    let plans: Vec<Plan> = [1, 2, u64::MAX]
        .map(|seed| Plan {
            sampling: SamplingParams { temperature: 1.2, top_p: 0.9, seed, ..GREEDY },
            ..Plan::new(1, 12, 80)
        })
        .into();
    let expected: Vec<_> = plans.iter().map(|plan| alone(&checkpoint(MODEL), plan)).collect();
    assert!(expected[0].ids != expected[1].ids && expected[1].ids != expected[2].ids);
    for workers in [1, 2, 4] {
        let found = play(&mut open(&checkpoint(MODEL), workers, 3, 64), 3, &plans);
        assert!(found == expected, "{workers} workers");
    }
}

#[test]
fn filters_that_leave_one_token_are_greedy() {
    let expected = tokens(GREEDY);
    let hot = SamplingParams { temperature: 2.0, seed: 9, ..GREEDY };
    assert!(tokens(hot).ids != expected.ids, "unfiltered, this temperature wanders");
    for (what, sampling) in [
        ("top-k 1", SamplingParams { top_k: 1, ..hot }),
        ("tiny top-p", SamplingParams { top_p: 1e-6, ..hot }),
        ("top-p 0", SamplingParams { top_p: 0.0, ..hot }),
        ("min-p 1", SamplingParams { min_p: 1.0, ..hot }),
        ("tiny temperature", SamplingParams { temperature: 1e-6, ..hot }),
    ] {
        assert!(tokens(sampling) == expected, "{what}");
    }
}

/// Probabilities after the filters, in f64: temperature, top-k, top-p, min-p.
fn distribution(row: &[f32], params: &SamplingParams) -> Vec<f64> {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: &f32| (f64::from(logit - largest) / f64::from(params.temperature)).exp();
    let mut weights: Vec<f64> = row.iter().map(weight).collect();
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b)));
    if params.top_k > 0 {
        order.truncate(params.top_k as usize);
    }
    let wanted = order.iter().map(|i| weights[*i]).sum::<f64>() * f64::from(params.top_p);
    let mut covered = 0.0;
    let count = order.iter().take_while(|i| {
        let is_needed = params.top_p == 1.0 || covered < wanted;
        covered += weights[**i];
        is_needed
    });
    let count = count.count();
    order.truncate(count);
    order.retain(|i| weights[*i] >= f64::from(params.min_p));
    let total: f64 = order.iter().map(|i| weights[*i]).sum();
    let mut kept = vec![0.0; row.len()];
    order.iter().for_each(|i| kept[*i] = weights[*i] / total);
    std::mem::swap(&mut weights, &mut kept);
    weights
}

/// The statistic of Pearson's test and its degrees of freedom; tokens that are expected fewer than
/// five times are counted together.
fn chi_square(counts: &[u32], probabilities: &[f64], draw_count: u32) -> (f64, f64) {
    let (mut statistic, mut bin_count, mut rare) = (0.0, 0.0, (0.0, 0.0));
    let mut add = |count: f64, expected: f64| {
        statistic += (count - expected).powi(2) / expected;
        bin_count += 1.0;
    };
    for (count, probability) in counts.iter().zip(probabilities) {
        let (count, expected) = (f64::from(*count), probability * f64::from(draw_count));
        if expected < 5.0 {
            rare = (rare.0 + count, rare.1 + expected);
        } else {
            add(count, expected);
        }
    }
    if rare.1 >= 5.0 {
        add(rare.0, rare.1);
    }
    (statistic, bin_count - 1.0)
}

#[test]
fn draws_follow_the_filtered_softmax() {
    const DRAW_COUNT: u32 = 4000;
    let warm = SamplingParams { temperature: 1.5, ..GREEDY };
    let path = checkpoint(MODEL);
    let prompt = Plan::new(5, 3, 1);
    let row: Vec<f32> =
        alone(&path, &prompt).rows[2].iter().map(|bits| f32::from_bits(*bits)).collect();
    let mut engine = open(&path, 2, 8, 24);
    for (what, sampling) in [
        ("temperature", warm),
        ("top-k", SamplingParams { top_k: 12, ..warm }),
        ("top-p", SamplingParams { top_p: 0.6, ..warm }),
        ("min-p", SamplingParams { min_p: 0.1, ..warm }),
        ("all", SamplingParams { top_k: 30, top_p: 0.8, min_p: 0.05, temperature: 1.1, ..warm }),
    ] {
        let plan = |seed: u32| Plan {
            sampling: SamplingParams { seed: u64::from(seed) * 7919, ..sampling },
            want_logits: false,
            ..prompt.clone()
        };
        let plans: Vec<Plan> = (0..DRAW_COUNT).map(plan).collect();
        let probabilities = distribution(&row, &sampling);
        let mut counts = vec![0; row.len()];
        for answer in play(&mut engine, 8, &plans) {
            assert!(probabilities[answer.ids[0] as usize] > 0.0, "{what}: a token filtered out");
            counts[answer.ids[0] as usize] += 1;
        }
        let (statistic, freedom) = chi_square(&counts, &probabilities, DRAW_COUNT);
        // Five standard deviations above the mean of the distribution of the statistic. The seeds
        // are fixed, so the outcome is too.
        assert!(freedom >= 4.0, "{what}: {freedom} degrees of freedom tell nothing");
        let limit = freedom + 5.0 * (2.0 * freedom).sqrt();
        assert!(statistic < limit, "{what}: {statistic}, {freedom} degrees of freedom");
        println!("{what}: chi-square {statistic:.1}, {freedom} degrees of freedom");
    }
}

/// The largest penalised logit at each step, from the logits that the engine gave.
fn greedy_with_penalties(answer: &Answer, plan: &Plan) -> Vec<u32> {
    let params = &plan.sampling;
    let mut ids: Vec<u32> = Vec::new();
    for row in &answer.rows[plan.prompt.len() - 1..] {
        let mut row: Vec<f32> = row.iter().map(|bits| f32::from_bits(*bits)).collect();
        for (token, logit) in (0u32..).zip(&mut row) {
            let count = ids.iter().filter(|id| **id == token).count() as f32;
            if count > 0.0 || plan.prompt.contains(&token) {
                let penalty = params.repetition_penalty;
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
            if count > 0.0 {
                *logit -= params.frequency_penalty * count + params.presence_penalty;
            }
        }
        ids.push(argmax(&row));
    }
    ids
}

#[test]
fn penalties_change_logits_as_defined() {
    let plain = tokens(GREEDY).ids;
    for (what, sampling) in [
        ("repetition", SamplingParams { repetition_penalty: 1.8, ..GREEDY }),
        ("frequency", SamplingParams { frequency_penalty: 1.5, ..GREEDY }),
        ("presence", SamplingParams { presence_penalty: 3.0, ..GREEDY }),
        ("a reward", SamplingParams { repetition_penalty: 0.7, ..GREEDY }),
        (
            "all",
            SamplingParams {
                repetition_penalty: 1.2,
                frequency_penalty: 0.4,
                presence_penalty: 0.6,
                ..GREEDY
            },
        ),
    ] {
        let plan = Plan { sampling, ..Plan::new(1, 12, 60) };
        let answer = alone(&checkpoint(MODEL), &plan);
        assert_eq!(answer.ids, greedy_with_penalties(&answer, &plan), "{what}");
        assert_ne!(answer.ids, plain, "{what} has an effect");
    }
}

//! Sample tasks: tokens, ends and outputs, beside the sampler that sorts.

use tilert_mk_model::reference;
use tilert_mk_shared::limits::STOP_ID_COUNT_MAX;
use tilert_mk_shared::mailbox::OutputKind;
use tilert_mk_shared::sample::SamplingParams;
use tilert_mk_shared::sequence::{
    NO_LOGITS, SequenceParams, SequenceState, StepToken, WANT_LOGITS,
};
use tilert_mk_shared::task::{Opcode, Task};

use crate::rig::{Random, Rig, dims};

const GREEDY: SamplingParams = SamplingParams::GREEDY;
const VOCAB: usize = 300;
/// Mark of a token of the prompt.
const IN_PROMPT: u32 = 1 << 31;

/// Parameters of all kinds.
fn all_params() -> Vec<SamplingParams> {
    let warm = SamplingParams { temperature: 0.8, ..GREEDY };
    vec![
        GREEDY,
        warm,
        SamplingParams { temperature: 5.0, ..warm },
        SamplingParams { top_k: 1, ..warm },
        SamplingParams { top_k: 17, ..warm },
        SamplingParams { top_k: 1000, ..warm },
        SamplingParams { top_p: 0.7, ..warm },
        SamplingParams { top_p: 0.0, ..warm },
        SamplingParams { min_p: 0.2, ..warm },
        SamplingParams { top_k: 50, top_p: 0.9, min_p: 0.05, ..warm },
        SamplingParams { repetition_penalty: 1.3, ..GREEDY },
        SamplingParams { frequency_penalty: 0.7, presence_penalty: 0.4, top_k: 9, ..warm },
    ]
}

/// A sequence before its token at `position` is chosen.
fn state(sampling: SamplingParams, position: u32) -> SequenceState {
    SequenceState {
        params: SequenceParams {
            prompt_count: 4,
            generate_max: 1000,
            flags: 0,
            stop_id_count: 0,
            stop_ids: [0; STOP_ID_COUNT_MAX],
            sampling,
        },
        is_active: 1,
        position,
        token_count: position + 1,
        generated_count: position - 3,
    }
}

/// Logits with ties, from coarse values.
fn logits(random: &mut Random, is_coarse: bool) -> Vec<f32> {
    let value = |value: f32| if is_coarse { (value * 4.0).round() } else { value * 6.0 };
    random.values(VOCAB).into_iter().map(value).collect()
}

/// Runs one step that chooses a token for slot 1 from `row`; the outputs as `(kind, value)`, and
/// the slot's state.
fn choose(rig: &Rig, row: &[f32], before: SequenceState) -> (Vec<(u32, u32)>, SequenceState) {
    let plan = rig.header.plan;
    let token = |slot, position, logit_row| StepToken { token: 0, slot, position, logit_row };
    // Slot 0 is still in its prompt.
    rig.set_step(&[token(0, 8, NO_LOGITS), token(1, before.position, 0)]);
    let states = rig.heap::<SequenceState>(plan.sequences, 3);
    states.write(0, SequenceState { token_count: 50, ..state(GREEDY, 8) });
    states.write(1, before);
    rig.heap::<f32>(plan.logits, VOCAB as u64).as_mut_slice().copy_from_slice(row);
    let first = rig.mailbox().output_tail.value;
    rig.run(&Task::new(Opcode::Sample));
    let mailbox = rig.mailbox();
    let outputs = (first..mailbox.output_tail.value).map(|idx| {
        let output = mailbox.outputs[idx as usize % mailbox.outputs.len()];
        assert_eq!((output.slot, output.position), (1, before.position));
        (output.kind, output.value)
    });
    assert_eq!(states.get(0).position, 9, "a token of the prompt moves its sequence on");
    (outputs.collect(), *states.get(1))
}

#[test]
fn tokens_are_those_of_the_sampler_that_sorts() {
    Rig::for_each_isa(&dims(64, [2, 1, 8], 64), |rig| {
        let plan = rig.header.plan;
        for (idx, params) in all_params().into_iter().enumerate() {
            let mut random = Random::new(idx as u64);
            for round in 0..60u32 {
                let row = logits(&mut random, round % 3 == 0);
                let sampling = SamplingParams { seed: u64::from(round) * 31, ..params };
                let before = state(sampling, 3 + round % 40);
                let (prompt, answer) = ([1, 2, 250], [2, 7, 7, 7]);
                let marks = rig.heap::<u32>(plan.token_marks, 3 * VOCAB as u64);
                let marks = marks.sub(VOCAB, VOCAB);
                marks.as_mut_slice().fill(0);
                prompt.iter().for_each(|token| marks.write(*token as usize, IN_PROMPT));
                for token in answer {
                    marks.write(token as usize, marks.read(token as usize) + 1);
                }
                let mut penalised = row.clone();
                if sampling.has_penalty() {
                    reference::penalise(&mut penalised, &prompt, &answer, &sampling);
                }
                let expected = reference::sample(&penalised, &sampling, before.generated_count);
                let expected = expected.expect("all are numbers");
                let (outputs, after) = choose(rig, &row, before);
                assert_eq!(outputs, [(OutputKind::Token as u32, expected)], "{sampling:?}");
                let tokens = rig.heap::<u32>(plan.tokens, 2 * 64);
                assert_eq!(tokens.read(64 + before.token_count as usize), expected);
                let counts = (after.token_count, after.generated_count, after.position);
                let (token_count, position) = (before.token_count + 1, before.position + 1);
                assert_eq!(counts, (token_count, before.generated_count + 1, position));
                let old = [1, 2, 250, 7].contains(&expected);
                if sampling.has_penalty() && !old {
                    assert_eq!(marks.read(expected as usize), 1, "the new token is counted");
                }
            }
        }
    });
}

#[test]
fn a_sequence_ends_by_length_stop_or_logits_that_are_not_numbers() {
    let mut row = vec![0.0; VOCAB];
    row[123] = 1.0;
    let token = (OutputKind::Token as u32, 123);
    Rig::for_each_isa(&dims(64, [2, 1, 8], 64), |rig| {
        let mut before = state(GREEDY, 10);
        before.params.generate_max = before.generated_count + 1;
        let (outputs, after) = choose(rig, &row, before);
        assert_eq!(outputs, [token, (OutputKind::EndLength as u32, 0)]);
        assert_eq!(after.is_active, 0);

        before.params.stop_id_count = 2;
        before.params.stop_ids[..3].copy_from_slice(&[7, 123, 0]);
        let (outputs, after) = choose(rig, &row, before);
        assert_eq!(outputs, [token, (OutputKind::EndStop as u32, 0)], "a stop is not a length");
        assert_eq!(after.is_active, 0);

        before = state(GREEDY, 10);
        before.params.flags = WANT_LOGITS;
        let (outputs, after) = choose(rig, &row, before);
        assert_eq!(outputs, [(OutputKind::Logits as u32, 0), token]);
        assert_eq!(after.is_active, 1);

        for (index, value) in [(0, f32::NAN), (VOCAB - 1, -f32::NAN), (5, f32::INFINITY)] {
            let mut bad = row.clone();
            bad[index] = value;
            let (outputs, after) = choose(rig, &bad, state(GREEDY, 10));
            assert_eq!(outputs, [(OutputKind::EndNotANumber as u32, 0)], "{value} at {index}");
            assert_eq!((after.is_active, after.generated_count), (0, 7));
        }
    });
}

#[test]
fn a_step_chooses_for_each_of_its_sequences() {
    Rig::for_each_isa(&dims(64, [2, 1, 8], 64), |rig| {
        let plan = rig.header.plan;
        let mut random = Random::new(77);
        let rows = random.values(3 * VOCAB);
        let token = |slot, logit_row| StepToken { token: 0, slot, position: 5 + slot, logit_row };
        rig.set_step(&[token(0, 0), token(1, 1), token(2, 2)]);
        let params = [GREEDY, GREEDY, SamplingParams { temperature: 1.0, seed: 4, ..GREEDY }];
        let states = rig.heap::<SequenceState>(plan.sequences, 3);
        for (slot, params) in (0..3).zip(params) {
            states.write(slot as usize, state(params, 5 + slot));
        }
        rig.heap::<f32>(plan.logits, 3 * VOCAB as u64).as_mut_slice().copy_from_slice(&rows);
        let first = rig.mailbox().output_tail.value as usize;
        rig.run(&Task::new(Opcode::Sample));
        let outputs = rig.mailbox().outputs;
        for (slot, params) in params.iter().enumerate() {
            let row = &rows[slot * VOCAB..][..VOCAB];
            let expected = reference::sample(row, params, slot as u32 + 2);
            let output = outputs[first + slot];
            assert_eq!((output.slot, Some(output.value)), (slot as u32, expected));
        }
    });
}

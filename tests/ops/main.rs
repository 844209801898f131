//! Each device op beside its slow twin in `model/reference`, on the CPU machine, for every
//! instruction set that this computer has.
//!
//! Tolerances are bounds, not fits: an f32 operation rounds by at most `UNIT` of its result, and a
//! sum of `n` products in the order of the device by `n * UNIT` of the sum of their magnitudes
//! (Higham, "Accuracy and Stability of Numerical Algorithms", chapter 3). The twin's own error is
//! far smaller.

mod attention;
mod linear;
mod rig;
mod sample;
mod takeover;

use rig::{Random, Rig, dims, matrix};
use tilert_mk_model::reference;
use tilert_mk_shared::sequence::{NO_LOGITS, StepToken};
use tilert_mk_shared::task::EmbedArgs;

#[test]
fn embed() {
    for format in rig::FORMATS {
        for hidden_dim in [8, 72, 64, 136] {
            let dims = dims(hidden_dim, [2, 1, 8], 64);
            let mut random = Random::new(hidden_dim.into());
            let (stored, table) = matrix(&mut random, format, 50 * hidden_dim as usize);
            Rig::for_each_isa(&dims, |rig| {
                let ids = [49, 0, 7, 7, 31];
                let step_token =
                    |token| StepToken { token, logit_row: NO_LOGITS, ..StepToken::default() };
                rig.set_step(&ids.map(step_token));
                let plan = rig.header.plan;
                let args = EmbedArgs { format, table: stored.address(), hidden: plan.hidden };
                rig.run(&args.pack());
                let found = rig.heap::<f32>(plan.hidden, 5 * u64::from(hidden_dim));
                for (row, token) in found.as_slice().chunks(hidden_dim as usize).zip(ids) {
                    let expected = reference::embed(&table, hidden_dim as usize, token);
                    assert_eq!(row, expected, "{format:?}, token {token}");
                }
            });
        }
    }
}

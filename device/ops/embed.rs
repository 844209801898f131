//! Embedding: `hidden[token] = table[id]`.

use tilert_mk_shared::task::EmbedArgs;

use crate::machine::cpu::widen;
use crate::worker::{Claim, Worker};

pub(super) fn run(worker: &Worker, claim: &Claim) {
    let args = EmbedArgs::unpack(&claim.task);
    let dim = u64::from(worker.header.dims.hidden_dim);
    let step_view = super::step(worker);
    let step = &step_view.as_slice()[0];
    let hidden = worker.heap::<f32>(args.hidden, u64::from(step.token_count) * dim);
    for (token, out) in step.tokens.iter().zip(hidden.as_mut_slice().chunks_exact_mut(dim as usize))
    {
        widen(worker.isa, args.table, args.format, u64::from(token.token) * dim, out);
    }
}

//! Embedding: `hidden[token] = table[id]`.

use tilert_mk_shared::task::EmbedArgs;

use crate::machine::Machine;
use crate::worker::{Claim, Worker};

#[inline(always)]
pub(crate) fn run<M: Machine>(worker: &Worker<M>, claim: &Claim) {
    let args = EmbedArgs::unpack(claim.task);
    let dim = u64::from(worker.header().dims.hidden_dim);
    let step_view = super::step(worker);
    let step = step_view.get(0);
    let hidden = worker.heap::<f32>(args.hidden, u64::from(step.token_count) * dim);
    for token_idx in 0..step.token_count as usize {
        let first = u64::from(step.tokens[token_idx].token) * dim;
        let out = hidden.sub(token_idx * dim as usize, dim as usize);
        worker.machine.widen(args.table, args.format, first, out);
    }
}

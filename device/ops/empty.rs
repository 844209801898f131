//! Nothing, in the way of tasks that compute something: waits for its input and leaves values.

use tilert_mk_shared::task::EmptyArgs;

use crate::machine::Machine;
use crate::worker::{Claim, Worker};

#[inline(always)]
pub(crate) fn run<M: Machine>(worker: &Worker<M>, claim: &Claim) {
    let args = EmptyArgs::unpack(&worker.machine.record(claim.task));
    if M::HAS_STAMPS && args.to != 0 {
        let from = worker.heap(args.from, args.count.into());
        worker.machine.pass_on(from, worker.heap(args.to, args.len.into()));
        worker.announce(claim);
    }
}

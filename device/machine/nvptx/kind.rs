//! What the compiler knows of an op's tasks when it compiles the op's function.
//!
//! Each kind is a type: an op's function is made of the code of its own kind alone, not of all kinds'
//! code that is then found not to run, which takes the compiler minutes.

use core::marker::PhantomData;

use tilert_mk_shared::task::{Task, WeightFormat};

use super::block::Block;
use super::op_block::OpBlock;
use super::{attention, sreg};
use crate::machine::{self, Rows};
use crate::ops;
use crate::worker::{Claim, Stopped, Worker};

/// A kind of tasks.
pub trait Kind: Sized {
    /// Format of the tasks' weights, if they have any.
    const FORMAT: WeightFormat = WeightFormat::F32;
    /// Whether input rows are kept as parts.
    const IS_NARROW: bool = false;
    /// Whether they come in pieces. They are what a stage has left, without a prologue.
    const IN_PIECES: bool = false;
    /// Whether they leave the best of their results, if a task says so.
    const LEAVES_BEST: bool = false;
    /// Whether attention merges splits.
    const JOINS: bool = false;

    /// Leaves the partial sums of all products of `count` rows; see `multiply::product`. The block meets after.
    #[inline(always)]
    fn multiply(_block: &Block, _task: &Task, _x: Rows, _count: u32) {
        sreg::trap()
    }

    /// See `Machine::attend`.
    #[inline(always)]
    fn attend(_block: &Block, _attention: &machine::Attention) {
        sreg::trap()
    }

    /// Runs the op. Collective.
    fn run(worker: &Worker<OpBlock<Self>>, claim: &Claim) -> Result<(), Stopped>;
}

/// Products with weights of a format.
pub trait Format {
    /// The format.
    const FORMAT: WeightFormat;

    /// See `Kind::multiply`; whether rows are kept as parts, and come in pieces.
    fn multiply<const NARROW: bool, const IN_PIECES: bool>(
        block: &Block,
        task: &Task,
        x: Rows,
        count: u32,
    );
}

/// Linear tasks.
pub struct Linear<F, const NARROW: bool, const BEST: bool>(PhantomData<F>);

impl<F: Format, const NARROW: bool, const BEST: bool> Kind for Linear<F, NARROW, BEST> {
    const FORMAT: WeightFormat = F::FORMAT;
    const IS_NARROW: bool = NARROW;
    const LEAVES_BEST: bool = BEST;

    #[inline(always)]
    fn multiply(block: &Block, task: &Task, x: Rows, count: u32) {
        F::multiply::<NARROW, false>(block, task, x, count);
    }

    #[inline(always)]
    fn run(worker: &Worker<OpBlock<Self>>, claim: &Claim) -> Result<(), Stopped> {
        ops::linear::run(worker, claim);
        Ok(())
    }
}

/// Linear tasks of few rows that come in pieces.
#[cfg(tilert_sm90)]
pub struct Pieces<F>(PhantomData<F>);

#[cfg(tilert_sm90)]
impl<F: Format> Kind for Pieces<F> {
    const FORMAT: WeightFormat = F::FORMAT;
    const IS_NARROW: bool = true;
    const IN_PIECES: bool = true;

    #[inline(always)]
    fn multiply(block: &Block, task: &Task, x: Rows, count: u32) {
        F::multiply::<true, true>(block, task, x, count);
    }

    #[inline(always)]
    fn run(worker: &Worker<OpBlock<Self>>, claim: &Claim) -> Result<(), Stopped> {
        ops::linear::run(worker, claim);
        Ok(())
    }
}

/// Attention, with `D` loads of a lane for each key, `B` keys and `Q` queries at once.
pub struct Attention<const D: usize, const B: usize, const Q: usize, const JOINS: bool>;

impl<const D: usize, const B: usize, const Q: usize, const JOINS: bool> Kind
    for Attention<D, B, Q, JOINS>
{
    const JOINS: bool = JOINS;

    #[inline(always)]
    fn attend(block: &Block, attention: &machine::Attention) {
        attention::attend::<D, B, Q>(block, attention);
    }

    #[inline(always)]
    fn run(worker: &Worker<OpBlock<Self>>, claim: &Claim) -> Result<(), Stopped> {
        ops::attention::run(worker, claim);
        Ok(())
    }
}

/// Empty tasks.
pub struct Empty;

impl Kind for Empty {
    #[inline(always)]
    fn run(worker: &Worker<OpBlock<Self>>, claim: &Claim) -> Result<(), Stopped> {
        ops::empty::run(worker, claim);
        Ok(())
    }
}

/// The task that begins a step.
pub struct Admit;

impl Kind for Admit {
    #[inline(always)]
    fn run(worker: &Worker<OpBlock<Self>>, _claim: &Claim) -> Result<(), Stopped> {
        ops::admit::run(worker)
    }
}

/// The embedding.
pub struct Embed;

impl Kind for Embed {
    #[inline(always)]
    fn run(worker: &Worker<OpBlock<Self>>, claim: &Claim) -> Result<(), Stopped> {
        ops::embed::run(worker, claim);
        Ok(())
    }
}

/// The task that ends a step.
pub struct Sample;

impl Kind for Sample {
    #[inline(always)]
    fn run(worker: &Worker<OpBlock<Self>>, _claim: &Claim) -> Result<(), Stopped> {
        ops::sample::run(worker);
        Ok(())
    }
}

/// Not an op: the loop around them.
pub struct Loop;

impl Kind for Loop {
    #[inline(always)]
    fn run(_worker: &Worker<OpBlock<Self>>, _claim: &Claim) -> Result<(), Stopped> {
        sreg::trap()
    }
}

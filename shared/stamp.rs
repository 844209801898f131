//! Stamped values: each activation in one word with the stamp of the stage that stored it.
//!
//! Whoever reads such a word sees by itself whether it is the value it waits for, so neither the
//! store nor the read needs any order with other accesses: a stage need not release what it has
//! stored, which costs a GPU under load more than the store itself, and its event is no more than a
//! hint at when to look. The regions from `HeapPlan::hidden` to `HeapPlan::logits` have such words
//! in `HeapPlan::stamped`, where `Dims::is_stamped` says so; offsets in tasks and programs name the
//! plain values in any case.
//!
//! A word is overwritten only by tasks that need values of all its readers, directly or not: a task
//! that has stored a value has read all its input.

/// The stamp of what tasks store that signal event `event` in step `epoch`. Of 2^32 stages in a row
/// no two have the same; steps count from 1, so the first ones do not have that of fresh memory, 0.
#[inline]
pub const fn stamp(epoch: u32, event: u32, event_count: u32) -> u32 {
    epoch.wrapping_mul(event_count).wrapping_add(event)
}

/// Values of which a GPU's warp takes four a lane: their words lie such that lanes with adjacent
/// fours read adjacent pairs of words.
pub const STAMPED_GROUP: u32 = 128;
/// Words from the first two of four adjacent values to the other two.
pub const STAMPED_HALF: u32 = STAMPED_GROUP / 2;

/// Index of the word of the value at `index`: of each group, the first two of every four adjacent
/// values come before the other two.
#[inline]
pub const fn stamped_index(index: u32) -> u32 {
    let (group, four) = (index & !(STAMPED_GROUP - 1), index % STAMPED_GROUP / 4);
    group + (index / 2 % 2) * STAMPED_HALF + four * 2 + index % 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_has_a_word_of_its_own() {
        const COUNT: usize = 3 * STAMPED_GROUP as usize;
        let mut is_taken = [false; COUNT];
        for index in 0..COUNT as u32 {
            let place = stamped_index(index) as usize;
            assert!(!core::mem::replace(&mut is_taken[place], true), "word {place} is shared");
        }
        let first = [0, 1, 2, 3, 4, 5, 6, 7].map(stamped_index);
        assert_eq!(first, [0, 1, 64, 65, 2, 3, 66, 67]);
    }

    #[test]
    fn stages_of_a_step_and_of_the_next_have_different_stamps() {
        const EVENTS: u32 = 7;
        let of = |epoch: u32| (0..EVENTS).map(move |event| stamp(epoch, event, EVENTS));
        for (a, b) in [(1, 2), (2, 3), (1, u32::MAX)] {
            assert!(of(a).all(|stamp| stamp != 0 && of(b).all(|other| other != stamp)));
        }
    }
}

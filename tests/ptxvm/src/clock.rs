//! Vector clocks that threads share until they differ.

use std::sync::Arc;

/// A vector clock. Missing components are zero. Cloning shares.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clock(Option<Arc<Vec<u32>>>);

impl Clock {
    #[inline]
    pub(crate) fn get(&self, at: usize) -> u32 {
        self.0.as_ref().and_then(|v| v.get(at)).copied().unwrap_or(0)
    }

    fn slice(&self) -> &[u32] {
        self.0.as_ref().map_or(&[], |v| v)
    }

    pub(crate) fn same(&self, other: &Clock) -> bool {
        match (&self.0, &other.0) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        }
    }

    pub(crate) fn covers(&self, other: &Clock) -> bool {
        let (mine, theirs) = (self.slice(), other.slice());
        let shared = mine.len().min(theirs.len());
        mine[..shared].iter().zip(&theirs[..shared]).all(|(a, b)| a >= b)
            && theirs[shared..].iter().all(|&b| b == 0)
    }

    /// Raises this clock to include `other`.
    pub(crate) fn join(&mut self, other: &Clock) {
        if self.same(other) || self.covers(other) {
            return;
        }
        if other.covers(self) {
            self.0.clone_from(&other.0);
            return;
        }
        let theirs = other.slice();
        let vector = Arc::make_mut(self.0.get_or_insert_default());
        if vector.len() < theirs.len() {
            vector.resize(theirs.len(), 0);
        }
        for (a, b) in vector.iter_mut().zip(theirs) {
            *a = (*a).max(*b);
        }
    }

    /// Raises one component.
    pub(crate) fn raise(&mut self, at: usize, to: u32) {
        if self.get(at) >= to {
            return;
        }
        let vector = Arc::make_mut(self.0.get_or_insert_default());
        if vector.len() <= at {
            vector.resize(at + 1, 0);
        }
        vector[at] = to;
    }
}

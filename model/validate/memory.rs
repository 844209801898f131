//! Memory: no two unordered tasks touch the same bytes if one of them writes, and every value that
//! is read was made for it.
//!
//! Accesses are collected by stage and region. The tasks of a stage are concurrent, so their writes
//! must be disjoint; then a stage counts as one reader and one writer of a few ranges, and only
//! stages are compared with each other.

use tilert_mk_shared::limits::ATTENTION_SPLIT_MAX;

use super::access::{Access, REGION_KINDS, Region};
use super::error::ValidateError;
use super::order::Order;
use super::stamps;
use crate::lower::Program;

/// No group yet.
const NONE: u32 = u32::MAX;

/// A range of columns and who touches it.
#[derive(Clone, Copy, Debug)]
struct Range {
    first: u64,
    end: u64,
    task_idx: u32,
    /// Another task with the same range, or the same task.
    other_idx: u32,
}

/// Columns that are touched, as ascending ranges that do not touch each other.
type Union = Vec<(u64, u64)>;

/// What the tasks of one stage do to one region.
#[derive(Debug, Default)]
struct Group {
    stage: u32,
    reads: Vec<Range>,
    writes: Vec<Range>,
    read_union: Union,
    write_union: Union,
}

/// All accesses of a program.
pub(super) struct Memory<'a> {
    program: &'a Program,
    order: &'a Order,
    /// `[stages, REGION_KINDS]` index into `groups`.
    group_of: Vec<u32>,
    /// For each region, what stages do to it.
    groups: Vec<Vec<Group>>,
}

/// The last write of a range of columns.
#[derive(Clone, Copy)]
struct Cell {
    /// Index of the writing group.
    writer: Option<u32>,
    is_read: bool,
}

impl<'a> Memory<'a> {
    pub(super) fn new(program: &'a Program, order: &'a Order) -> Self {
        Memory {
            program,
            order,
            group_of: vec![NONE; order.stages.len() * REGION_KINDS],
            groups: (0..REGION_KINDS).map(|_| Vec::new()).collect(),
        }
    }

    /// Adds what a task does.
    pub(super) fn add(&mut self, task_idx: u32, accesses: &[Access]) {
        let stage = self.order.stage_of[task_idx as usize];
        for access in accesses.iter().filter(|access| access.first < access.end) {
            let region = access.region as usize;
            let groups = &mut self.groups[region];
            let group_idx = &mut self.group_of[stage as usize * REGION_KINDS + region];
            if *group_idx == NONE {
                *group_idx = groups.len() as u32;
                groups.push(Group { stage, ..Group::default() });
            }
            let group = &mut groups[*group_idx as usize];
            let list = if access.is_write { &mut group.writes } else { &mut group.reads };
            let (first, end) = (access.first, access.end);
            match list.last_mut() {
                // Most tasks of a stage read the same row; one entry stands for all of them.
                Some(last) if !access.is_write && (last.first, last.end) == (first, end) => {
                    last.other_idx = task_idx;
                }
                _ => list.push(Range { first, end, task_idx, other_idx: task_idx }),
            }
        }
    }

    /// Proves the order of all accesses.
    pub(super) fn check(&mut self) -> Result<(), ValidateError> {
        let mut groups = std::mem::take(&mut self.groups);
        for (region, groups) in Region::ALL.into_iter().zip(&mut groups) {
            for group in groups.iter_mut() {
                self.check_stage(region, group)?;
            }
            self.check_stages(region, groups)?;
            self.check_steps(region, groups)?;
        }
        self.check_kv(&groups[Region::Kv as usize])?;
        let mut values = Region::ALL.into_iter().zip(&groups);
        values.try_for_each(|(region, groups)| match region.is_step_local() {
            true => self.check_values(region, groups),
            false => Ok(()),
        })
    }

    fn name(&self, task_idx: u32) -> String {
        super::name(self.program, task_idx)
    }

    fn race(&self, region: Region, at: u64, tasks: [u32; 2], across_steps: bool) -> ValidateError {
        let [first, second] = tasks.map(|task_idx| self.name(task_idx));
        ValidateError::Race { first, second, region, at, across_steps }
    }

    /// Within a stage: writes are disjoint, and nobody reads what another writes.
    fn check_stage(&self, region: Region, group: &mut Group) -> Result<(), ValidateError> {
        group.writes.sort_unstable_by_key(|range| (range.first, range.end, range.task_idx));
        group.reads.sort_unstable_by_key(|range| (range.first, range.end, range.task_idx));
        for pair in group.writes.windows(2) {
            if pair[1].first < pair[0].end {
                let tasks = [pair[0].task_idx, pair[1].task_idx];
                return Err(self.race(region, pair[1].first, tasks, false));
            }
        }
        for read in &group.reads {
            let from = group.writes.partition_point(|write| write.end <= read.first);
            for write in group.writes[from..].iter().take_while(|write| write.first < read.end) {
                let readers = [read.task_idx, read.other_idx];
                if let Some(reader) = readers.into_iter().find(|task| *task != write.task_idx) {
                    let at = write.first.max(read.first);
                    return Err(self.race(region, at, [write.task_idx, reader], false));
                }
            }
        }
        group.read_union = union(&group.reads);
        group.write_union = union(&group.writes);
        Ok(())
    }

    /// Between stages of one step: conflicting stages are ordered.
    fn check_stages(&self, region: Region, groups: &[Group]) -> Result<(), ValidateError> {
        let writers = || groups.iter().filter(|group| !group.writes.is_empty());
        for writer in writers() {
            for group in groups.iter().filter(|group| group.stage != writer.stage) {
                let (a, b) = (writer.stage, group.stage);
                if !self.order.is_before(a, b) && !self.order.is_before(b, a) {
                    self.refuse_overlap(region, writer, group, false)?;
                }
            }
        }
        Ok(())
    }

    /// Between steps: a stage that does not end with its step meets all of the next one, and one
    /// that does not begin with its step meets all of the step before.
    fn check_steps(&self, region: Region, groups: &[Group]) -> Result<(), ValidateError> {
        for group in groups {
            let stage = &self.order.stages[group.stage as usize];
            if stage.is_after_begin && stage.is_before_end {
                continue;
            }
            for other in groups {
                self.refuse_overlap(region, group, other, true)?;
                self.refuse_overlap(region, other, group, true)?;
            }
        }
        Ok(())
    }

    /// Refuses any byte that `writer` writes and `group` touches.
    fn refuse_overlap(
        &self,
        region: Region,
        writer: &Group,
        group: &Group,
        across_steps: bool,
    ) -> Result<(), ValidateError> {
        for (union, list) in
            [(&group.read_union, &group.reads), (&group.write_union, &group.writes)]
        {
            if let Some(at) = first_common(&writer.write_union, union) {
                let tasks = [task_at(&writer.writes, at), task_at(list, at)];
                return Err(self.race(region, at, tasks, across_steps));
            }
        }
        Ok(())
    }

    /// Every value read was written before, all of a stage's by tasks of the same event; and every
    /// value written is read.
    fn check_values(&self, region: Region, groups: &[Group]) -> Result<(), ValidateError> {
        let unions = groups.iter().flat_map(|group| [&group.read_union, &group.write_union]);
        let mut edges: Vec<u64> = unions.flatten().flat_map(|range| [range.0, range.1]).collect();
        edges.sort_unstable();
        edges.dedup();
        let span = |range: &(u64, u64)| {
            let at = |edge: u64| edges.partition_point(|known| *known < edge);
            at(range.0)..at(range.1)
        };
        let mut cells = vec![Cell { writer: None, is_read: true }; edges.len()];
        for stage in &self.order.sequence {
            let group_idx = self.group_of[*stage as usize * REGION_KINDS + region as usize];
            let Some(group) = groups.get(group_idx as usize) else { continue };
            let mut newest: Option<u32> = None;
            for cell_idx in group.read_union.iter().flat_map(span) {
                let (cell, at) = (&mut cells[cell_idx], edges[cell_idx]);
                let Some(writer) = cell.writer else {
                    let task = self.name(task_at(&group.reads, at));
                    return Err(ValidateError::Unwritten { task, region, at });
                };
                cell.is_read = true;
                let event = |group_idx: u32| {
                    self.order.stages[groups[group_idx as usize].stage as usize].signal
                };
                let reader = &self.order.stages[*stage as usize];
                if let Some(expected) = stamps::expected(self.program, reader, region)
                    && newest.is_none()
                    && event(writer) != Some(expected)
                {
                    let writer = task_at(&groups[writer as usize].writes, at);
                    let (task, writer) = (self.name(task_at(&group.reads, at)), self.name(writer));
                    return Err(ValidateError::Stamp { task, region, at, expected, writer });
                }
                match newest {
                    Some(first) if event(first) != event(writer) => {
                        let task_idx = task_at(&group.reads, at);
                        return Err(self.stale(region, at, task_idx, [first, writer], groups));
                    }
                    _ => newest = Some(writer),
                }
            }
            for cell_idx in group.write_union.iter().flat_map(span) {
                let cell = &mut cells[cell_idx];
                self.refuse_unread(region, cell, edges[cell_idx], groups)?;
                *cell = Cell { writer: Some(group_idx), is_read: false };
            }
        }
        for (cell, at) in cells.iter().zip(&edges) {
            self.refuse_unread(region, cell, *at, groups)?;
        }
        Ok(())
    }

    fn refuse_unread(
        &self,
        region: Region,
        cell: &Cell,
        at: u64,
        groups: &[Group],
    ) -> Result<(), ValidateError> {
        match cell.writer {
            Some(writer) if !cell.is_read => {
                let task = self.name(task_at(&groups[writer as usize].writes, at));
                Err(ValidateError::Unread { task, region, at })
            }
            _ => Ok(()),
        }
    }

    /// One read met the leavings of two stages, of which the later one is what was wanted.
    fn stale(
        &self,
        region: Region,
        at: u64,
        task_idx: u32,
        writers: [u32; 2],
        groups: &[Group],
    ) -> ValidateError {
        let [first, second] = writers.map(|writer| &groups[writer as usize]);
        let is_first_older = self.order.is_before(first.stage, second.stage);
        let (older, newer) = if is_first_older { (first, second) } else { (second, first) };
        let first_task = |group: &Group| group.writes.first().map_or(0, |range| range.task_idx);
        ValidateError::Stale {
            task: self.name(task_idx),
            region,
            at,
            writer: self.name(first_task(older)),
            newer: self.name(first_task(newer)),
        }
    }

    /// Each split of each head and layer of the cache is appended to by one task of a step.
    fn check_kv(&self, groups: &[Group]) -> Result<(), ValidateError> {
        let kv = &self.program.dims.kv;
        let plane_count = kv.layer_count as usize * kv.kv_head_count as usize;
        let mut counts = vec![0u32; plane_count * ATTENTION_SPLIT_MAX as usize];
        for write in groups.iter().flat_map(|group| &group.writes) {
            if let Some(counts) = counts.get_mut(write.first as usize..write.end as usize) {
                counts.iter_mut().for_each(|count| *count += 1);
            }
        }
        match (0u32..).zip(&counts).find(|(_, count)| **count != 1) {
            Some((split, &count)) => Err(ValidateError::KvHead {
                layer_idx: split / ATTENTION_SPLIT_MAX / kv.kv_head_count,
                kv_head_idx: split / ATTENTION_SPLIT_MAX % kv.kv_head_count,
                split_idx: split % ATTENTION_SPLIT_MAX,
                count,
            }),
            None => Ok(()),
        }
    }
}

/// Joins sorted ranges.
fn union(ranges: &[Range]) -> Union {
    let mut joined: Union = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.first <= last.1 => last.1 = last.1.max(range.end),
            _ => joined.push((range.first, range.end)),
        }
    }
    joined
}

/// The first column in both unions.
fn first_common(a: &Union, b: &Union) -> Option<u64> {
    let (mut i, mut j) = (0, 0);
    while let (Some(left), Some(right)) = (a.get(i), b.get(j)) {
        let (first, end) = (left.0.max(right.0), left.1.min(right.1));
        if first < end {
            return Some(first);
        }
        if left.1 <= right.1 { i += 1 } else { j += 1 }
    }
    None
}

/// A task of the list that touches a column.
fn task_at(ranges: &[Range], at: u64) -> u32 {
    let hit = ranges.iter().find(|range| range.first <= at && at < range.end);
    hit.map_or(NONE, |range| range.task_idx)
}

//! Formats of operators: a task has one, so matrices that are multiplied together share it.

use tilert_mk_shared::task::{LinearArgs, Opcode, Task, WeightFormat};

use super::{LowerError, Program};
use crate::graph::{Graph, Kind, Linear, Tensor};

impl Program {
    /// The formats of all linear tasks, each once.
    pub fn formats(&self) -> Vec<WeightFormat> {
        let is_linear = |task: &&Task| task.opcode == Opcode::Linear as u16;
        let mut formats = Vec::new();
        for task in self.tasks.iter().filter(is_linear) {
            let format = LinearArgs::unpack(task).format;
            if !formats.contains(&format) {
                formats.push(format);
            }
        }
        formats
    }
}

/// An operator's matrices.
fn matrices<'a>(graph: &'a Graph, linear: &'a Linear) -> impl Iterator<Item = &'a Tensor> {
    linear.matrices.iter().map(|matrix| &graph.tensors[matrix.weight.0 as usize])
}

/// Checks that the matrices of each operator are all FP8, or none of them.
///
/// Errors:  `Mixed`.
pub(super) fn check(graph: &Graph) -> Result<(), LowerError> {
    for operator in &graph.operators {
        let Kind::Linear(linear) = &operator.kind else { continue };
        let find =
            |is_fp8: bool| matrices(graph, linear).find(|matrix| matrix.scales.is_some() == is_fp8);
        if let [Some(fp8), Some(other)] = [true, false].map(find) {
            let [fp8, other] = [fp8, other].map(|matrix| matrix.name.clone());
            return Err(LowerError::Mixed { operator: operator.name.clone(), fp8, other });
        }
    }
    Ok(())
}

/// The format in which tasks read an operator's matrices; they read `others` if those are not FP8.
pub(super) fn of_linear(graph: &Graph, linear: &Linear, others: WeightFormat) -> WeightFormat {
    matrices(graph, linear).next().map_or(others, |matrix| matrix.format(others))
}

//! Scales of FP8 matrices: each matrix has its own, of the right shape.

use tilert_mk_shared::blocks::FP8_BLOCK;

use super::ValidateError;
use crate::lower::Program;

/// Which tensors are scales: each of one matrix, of a value for each of its blocks.
pub(super) fn find(program: &Program) -> Result<Vec<bool>, ValidateError> {
    let mut is_scales = vec![false; program.tensors.len()];
    for matrix in &program.tensors {
        let Some(idx) = matrix.scales else { continue };
        let blocks = matrix.shape.iter().map(|axis| axis.div_ceil(FP8_BLOCK as u64));
        let scales = program.tensors.get(idx.0 as usize);
        let is_suited = scales.is_some_and(|scales| {
            scales.shape.iter().copied().eq(blocks) && scales.scales.is_none()
        });
        if !is_suited || std::mem::replace(&mut is_scales[idx.0 as usize], true) {
            return Err(ValidateError::Scales { tensor: matrix.name.clone() });
        }
    }
    Ok(is_scales)
}

//! The tensors that one packed matrix is made of.

use mlx_format::checkpoint::{Checkpoint, Tensor};
use mlx_format::{Dtype, FloatType};

use crate::SourceError;
use crate::matrix::{ScaleKind, Scales};

/// The tensors beside one that holds codes.
pub(super) struct Parts<'c> {
    checkpoint: &'c Checkpoint,
    /// Name of the codes.
    pub(super) name: &'c str,
    method: &'static str,
    taken: Vec<String>,
}

impl<'c> Parts<'c> {
    pub(super) fn new(checkpoint: &'c Checkpoint, name: &'c str, method: &'static str) -> Self {
        Self { checkpoint, name, method, taken: Vec::new() }
    }

    /// The codes themselves.
    pub(super) fn codes(&self) -> &'c Tensor {
        &self.checkpoint.tensors()[self.name]
    }

    /// The tensor of a name, which from now on belongs to this matrix.
    pub(super) fn take(&mut self, name: &str) -> Option<&'c Tensor> {
        let tensor = self.checkpoint.tensor(name)?;
        self.taken.push(name.to_owned());
        Some(tensor)
    }

    /// Names of everything that was taken, and of the codes.
    pub(super) fn taken(self) -> impl Iterator<Item = String> {
        self.taken.into_iter().chain([self.name.to_owned()])
    }

    /// An error that names file and shapes.
    pub(super) fn refuse(&self, reason: String) -> SourceError {
        let codes = self.codes();
        SourceError::PackedForm {
            tensor: self.name.to_owned(),
            dtype: codes.dtype,
            shape: codes.shape.clone(),
            file: self.checkpoint.file_of(codes),
            method: self.method,
            reason,
        }
    }

    /// A tensor that has to be there.
    pub(super) fn need(&mut self, name: &str) -> Result<&'c Tensor, SourceError> {
        self.take(name).ok_or_else(|| self.refuse(format!("{name} is missing")))
    }

    /// Integers of a tensor whose data is here: int32 or int64. Nothing where only headers are, or nothing but zeros.
    pub(super) fn integers(&self, tensor: &Tensor) -> Option<Vec<i64>> {
        if self.checkpoint.is_headers_only() {
            return None;
        }
        let bytes = self.checkpoint.bytes(tensor);
        let numbers: Vec<i64> = match tensor.dtype {
            Dtype::I64 => bytes.as_chunks::<8>().0.iter().map(|raw| i64::from_le_bytes(*raw)).collect(),
            Dtype::I32 => {
                bytes.as_chunks::<4>().0.iter().map(|raw| i64::from(i32::from_le_bytes(*raw))).collect()
            }
            _ => return None,
        };
        numbers.iter().any(|number| *number != 0).then_some(numbers)
    }

    /// The number in a float32 tensor of one element, where its data is here.
    pub(super) fn number(&self, tensor: &Tensor) -> Option<f32> {
        let raw = if self.checkpoint.is_headers_only() { &[] } else { self.checkpoint.bytes(tensor) };
        raw.first_chunk::<4>().map(|raw| f32::from_le_bytes(*raw)).filter(|number| *number != 0.0)
    }

    /// Scales `name` of a `[rows, columns]` matrix: one for all, one for each row, or one for each of some blocks. `block` says
    /// rows and columns of these where anything does; else they follow from the shape, one row each.
    pub(super) fn scales(
        &mut self,
        name: &str,
        [rows, columns]: [usize; 2],
        block: Option<[usize; 2]>,
    ) -> Result<Scales, SourceError> {
        let tensor = self.need(name)?;
        let kind = match tensor.dtype {
            Dtype::U8 | Dtype::F8_E8M0 => ScaleKind::E8m0,
            Dtype::F8_E4M3 => ScaleKind::E4m3,
            dtype => FloatType::from_dtype(dtype)
                .map(ScaleKind::Float)
                .ok_or_else(|| self.refuse(format!("its scales {name} are {dtype}")))?,
        };
        let scales = |rows: usize, columns: usize| Scales {
            tensor: name.to_owned(),
            kind,
            rows: rows.max(1),
            columns: columns.max(1),
            turned: false,
        };
        if tensor.elements() == 1 {
            return Ok(scales(rows, columns));
        }
        let shape = match tensor.shape[..] {
            [rows] => [rows, 1],
            [rows, groups] => [rows, groups],
            _ => [0, 0],
        };
        if shape == [rows, 1] {
            return Ok(scales(1, columns));
        }
        if let Some([high, wide]) = block.filter(|block| !block.contains(&0))
            && shape == [rows.div_ceil(high), columns.div_ceil(wide)]
        {
            return Ok(scales(high, wide));
        }
        if block.is_none() && shape[0] == rows && shape[1] != 0 && columns.is_multiple_of(shape[1]) {
            return Ok(scales(1, columns / shape[1]));
        }
        let asked =
            block.map_or_else(String::new, |block| format!(", in blocks of {block:?} as config.json says"));
        let found = &tensor.shape;
        Err(self.refuse(format!(
            "its scales {name} are of shape {found:?} for {rows} rows and {columns} columns{asked}"
        )))
    }
}

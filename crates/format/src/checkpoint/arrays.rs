//! Arrays of numbers in a file of their own: what a program writes for its own later runs.
//!
//! The form is safetensors, so that any tool of the field opens these files, but only four dtypes are known and everything
//! is read into plain vectors, value by value: such a file may have been cut off by a power failure or replaced by a
//! person, so that nothing in it is believed before it was checked against the length of the file.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result, Seek as _, SeekFrom, Write};

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde_json::{Map, Value, json};

/// The format allows no longer header.
const LONGEST_HEADER: u64 = 100_000_000;
/// Bytes that are converted at a time.
const PIECE: usize = 1 << 20;

/// Numbers of an array, row by row.
#[derive(Clone, Debug, PartialEq)]
pub enum Values<'v> {
    /// float32.
    F32(Cow<'v, [f32]>),
    /// Signed, 64 bits.
    I64(Cow<'v, [i64]>),
    /// Unsigned, 32 bits.
    U32(Cow<'v, [u32]>),
    /// Bytes.
    U8(Cow<'v, [u8]>),
}

/// An array of numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Array<'v> {
    /// Outermost axis first.
    pub shape: Vec<usize>,
    /// As many as the shape says.
    pub values: Values<'v>,
}

/// Arrays by name.
pub type Arrays<'v> = BTreeMap<String, Array<'v>>;

macro_rules! kind {
    ($variant:ident, $number:ty, $take:ident) => {
        impl<'v> From<&'v [$number]> for Values<'v> {
            fn from(values: &'v [$number]) -> Self {
                Self::$variant(Cow::Borrowed(values))
            }
        }

        impl From<Vec<$number>> for Values<'_> {
            fn from(values: Vec<$number>) -> Self {
                Self::$variant(Cow::Owned(values))
            }
        }

        impl Array<'_> {
            /// Its numbers, if they are of this dtype.
            pub fn $take(self) -> Option<Vec<$number>> {
                match self.values {
                    Values::$variant(values) => Some(values.into_owned()),
                    _ => None,
                }
            }
        }
    };
}

kind!(F32, f32, into_f32);
kind!(I64, i64, into_i64);
kind!(U32, u32, into_u32);
kind!(U8, u8, into_u8);

impl<'v> Array<'v> {
    /// Numbers in that shape.
    ///
    /// # Panics
    /// If the shape has another number of elements.
    pub fn new(shape: impl Into<Vec<usize>>, values: impl Into<Values<'v>>) -> Self {
        let own = Self { shape: shape.into(), values: values.into() };
        assert_eq!(own.shape.iter().product::<usize>(), own.values.len(), "a shape of other size");
        own
    }

    /// Numbers one after the other.
    pub fn flat(values: impl Into<Values<'v>>) -> Self {
        let values = values.into();
        Self { shape: vec![values.len()], values }
    }
}

impl Values<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::I64(values) => values.len(),
            Self::U32(values) => values.len(),
            Self::U8(values) => values.len(),
        }
    }

    const fn dtype(&self) -> Dtype {
        match self {
            Self::F32(_) => Dtype::F32,
            Self::I64(_) => Dtype::I64,
            Self::U32(_) => Dtype::U32,
            Self::U8(_) => Dtype::U8,
        }
    }

    fn bytes(&self) -> usize {
        self.len() * self.dtype().bitsize() / 8
    }

    fn write(&self, out: &mut impl Write) -> Result<()> {
        match self {
            Self::F32(values) => pieces(out, values, f32::to_le_bytes),
            Self::I64(values) => pieces(out, values, i64::to_le_bytes),
            Self::U32(values) => pieces(out, values, u32::to_le_bytes),
            Self::U8(values) => out.write_all(values),
        }
    }

    fn read(dtype: Dtype, file: &mut File, count: usize) -> Result<Option<Values<'static>>> {
        Ok(Some(match dtype {
            Dtype::F32 => numbers(file, count, f32::from_le_bytes)?.into(),
            Dtype::I64 => numbers(file, count, i64::from_le_bytes)?.into(),
            Dtype::U32 => numbers(file, count, u32::from_le_bytes)?.into(),
            Dtype::U8 => numbers(file, count, u8::from_le_bytes)?.into(),
            _ => return Ok(None),
        }))
    }
}

fn pieces<T: Copy, const N: usize>(
    out: &mut impl Write,
    values: &[T],
    bytes: impl Fn(T) -> [u8; N],
) -> Result<()> {
    let mut piece = Vec::with_capacity(PIECE.min(values.len() * N));
    for some in values.chunks(PIECE / N) {
        piece.clear();
        piece.extend(some.iter().flat_map(|value| bytes(*value)));
        out.write_all(&piece)?;
    }
    Ok(())
}

fn numbers<T, const N: usize>(
    file: &mut File,
    count: usize,
    number: impl Fn([u8; N]) -> T,
) -> Result<Vec<T>> {
    let mut values = Vec::with_capacity(count);
    let mut piece = vec![0; PIECE.min(count * N)];
    while values.len() < count {
        let bytes = &mut piece[..PIECE.min((count - values.len()) * N)];
        file.read_exact(bytes)?;
        values.extend(bytes.as_chunks::<N>().0.iter().map(|bytes| number(*bytes)));
    }
    Ok(values)
}

/// Writes arrays as the content of a safetensors file.
///
/// # Errors
/// What the system says.
pub fn write_arrays(out: &mut impl Write, arrays: &Arrays<'_>) -> Result<()> {
    // Widest first, so that every number lies at a multiple of its size.
    let mut all: Vec<(&String, &Array<'_>)> = arrays.iter().collect();
    all.sort_by_key(|(_, array)| std::cmp::Reverse(array.values.dtype().bitsize()));
    let (mut map, mut start) = (Map::new(), 0);
    for (name, Array { shape, values }) in &all {
        let end = start + values.bytes();
        let dtype = values.dtype().to_string();
        map.insert((*name).clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}));
        start = end;
    }
    let mut header = Value::Object(map).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    all.into_iter().try_for_each(|(_, array)| array.values.write(out))
}

fn damaged(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidData, reason.into())
}

/// The header of a file, and where its data begins.
fn header(file: &mut File) -> Result<(Metadata, u64)> {
    let bytes = file.metadata()?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|_| damaged(format!("{bytes} bytes are too few for its form")))?;
    let length = u64::from_le_bytes(length);
    if length > LONGEST_HEADER || length > bytes - 8 {
        return Err(damaged(format!("its header claims {length} bytes, the file has {bytes}")));
    }
    let mut text = vec![0; length as usize];
    file.read_exact(&mut text)?;
    let found: Metadata = serde_json::from_slice(&text)
        .map_err(|error| damaged(format!("its header is not valid: {error}")))?;
    let (data, wanted) = (bytes - 8 - length, found.data_len() as u64);
    if data != wanted {
        return Err(damaged(format!("it has {data} bytes of numbers, its header speaks of {wanted}")));
    }
    Ok((found, 8 + length))
}

/// Reads all arrays of a file.
///
/// # Errors
/// What the system says; [`ErrorKind::InvalidData`] for a file that is cut off, or that [`write_arrays`] did not write.
pub fn read_arrays(mut file: File) -> Result<Arrays<'static>> {
    let (found, data) = header(&mut file)?;
    let mut arrays = Arrays::new();
    for (name, info) in found.tensors() {
        file.seek(SeekFrom::Start(data + info.data_offsets.0 as u64))?;
        let count = info.shape.iter().product();
        let values = Values::read(info.dtype, &mut file, count)?;
        let values = values.ok_or_else(|| damaged(format!("{name} is of the dtype {}", info.dtype)))?;
        arrays.insert(name, Array { shape: info.shape.clone(), values });
    }
    Ok(arrays)
}

/// The shape of each array in a file, from its header alone.
///
/// # Errors
/// As [`read_arrays`].
pub fn array_shapes(mut file: File) -> Result<BTreeMap<String, Vec<usize>>> {
    let (found, _) = header(&mut file)?;
    Ok(found.tensors().into_iter().map(|(name, info)| (name, info.shape.clone())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        file
    }

    fn some() -> Arrays<'static> {
        Arrays::from([
            ("a".to_owned(), Array::new([2, 3], vec![1.0f32, -0.0, f32::NAN, f32::MAX, 1e-40, 2.5])),
            ("bytes".to_owned(), Array::flat(b"abc".to_vec())),
            ("count".to_owned(), Array::flat(vec![i64::MIN, i64::MAX])),
            ("ids".to_owned(), Array::new([1, 3], vec![u32::MAX, 0, 7])),
            ("nothing".to_owned(), Array::new([0, 4], Vec::<f32>::new())),
        ])
    }

    fn written(arrays: &Arrays<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_arrays(&mut bytes, arrays).unwrap();
        bytes
    }

    #[test]
    fn what_is_written_is_read_and_any_tool_can_read_it() {
        let arrays = some();
        let bytes = written(&arrays);
        let read = read_arrays(file(&bytes)).unwrap();
        // NaN is not equal to itself, its bytes are.
        assert_eq!(written(&read), bytes);
        assert_eq!(read.keys().collect::<Vec<_>>(), arrays.keys().collect::<Vec<_>>());
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.tensor("a").unwrap().shape(), [2, 3]);
        assert_eq!(theirs.tensor("count").unwrap().data()[..8], i64::MIN.to_le_bytes());
        assert_eq!(array_shapes(file(&bytes)).unwrap()["nothing"], [0, 4]);
        assert_eq!(read["ids"].clone().into_u32().unwrap(), [u32::MAX, 0, 7]);
        assert_eq!(read["ids"].clone().into_f32(), None);
    }

    #[test]
    fn more_than_a_piece_is_converted() {
        let values: Vec<f32> = (0..PIECE / 2 + 3).map(|at| at as f32).collect();
        let arrays = Arrays::from([("long".to_owned(), Array::flat(&values[..]))]);
        let read = read_arrays(file(&written(&arrays))).unwrap();
        assert_eq!(read["long"].clone().into_f32().unwrap(), values);
    }

    /// Cut off anywhere, or with anything behind its end, it is refused; and no byte makes it panic or take memory.
    #[test]
    fn damage_is_noticed() {
        let bytes = written(&some());
        for length in 0..bytes.len() {
            assert_eq!(read_arrays(file(&bytes[..length])).unwrap_err().kind(), ErrorKind::InvalidData);
        }
        let longer = [&bytes[..], b"x"].concat();
        assert!(read_arrays(file(&longer)).unwrap_err().to_string().contains("speaks of"));
        for at in 0..bytes.len().min(400) {
            for flip in [0xff, 0x01, 0x10] {
                let mut other = bytes.clone();
                other[at] ^= flip;
                let _ = read_arrays(file(&other));
            }
        }
        assert!(read_arrays(file(&[0; 64])).is_err());
        let foreign = br#"{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}"#;
        let foreign = [&(foreign.len() as u64).to_le_bytes()[..], foreign, b"ab"].concat();
        assert!(read_arrays(file(&foreign)).unwrap_err().to_string().contains("F16"));
    }
}

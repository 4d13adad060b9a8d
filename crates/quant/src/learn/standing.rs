//! How far a block has learned, in a file: a run that was stopped within a block goes on at a step of it.
//!
//! What lies there are the exact numbers that the next step would have met, so that a run that goes on writes the bytes of
//! one that was never stopped. A file that is missing, damaged, of other layers or of layers that began elsewhere costs
//! the steps and nothing else.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use mlx_format::checkpoint::{Array, Arrays};
use mlx_quant_model::WeightsError;

use super::layer::{Layer, Named, Standing};
use super::learner::{Learned, Learner, layers};
use crate::{Error, kept};

/// Where a block's steps are kept.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) path: PathBuf,
    /// Between two writings.
    pub(crate) every: Duration,
}

/// Where steps stand: of the layers that learn, in their order, what they stand at lies in the layers themselves.
#[derive(Debug)]
pub(super) struct Course {
    /// Steps that are done.
    pub(super) steps: usize,
    /// The best of them.
    pub(super) best: Learned,
    /// The layers then.
    pub(super) standing: Vec<Standing>,
}

/// What a file has of a layer.
struct Found {
    positions: Vec<f32>,
    factors: [Vec<f32>; 2],
    /// Codes and factors of the best step.
    best: (Vec<u8>, [Vec<f32>; 2]),
}

/// What a layer stands at and its best step, in this process's memory.
fn fetched(layer: &Layer, best: &Standing) -> mlx_quant_engine::Result<(Named, Named, Vec<u8>)> {
    Ok((layer.moved()?, best.factors()?, best.codes()?))
}

/// Steps, the best of them, and the bits of both errors.
const COURSE: &str = "course";
/// What a layer began with.
const BEGAN: &str = "began";

fn name(at: usize, part: &str) -> String {
    format!("{at}.{part}")
}

/// An array of so many numbers.
fn taken<N>(
    arrays: &mut Arrays<'static>,
    name: &str,
    count: usize,
    numbers: impl Fn(Array<'static>) -> Option<Vec<N>>,
) -> Option<Vec<N>> {
    arrays.remove(name).and_then(numbers).filter(|numbers| numbers.len() == count)
}

impl Kept {
    /// Writes where steps stand, if it is time or `now`.
    pub(super) fn write(
        &self,
        learners: &mut [Learner],
        course: &Course,
        (last, now): (&mut Instant, bool),
    ) -> Result<(), Error> {
        if !now && last.elapsed() < self.every {
            return Ok(());
        }
        let Course { steps, best, standing } = course;
        let mut arrays = Arrays::new();
        let counts = [*steps, best.step].map(|count| count as u64);
        let errors = [best.before, best.best].map(f64::to_bits);
        let course: Vec<i64> = counts.into_iter().chain(errors).map(u64::cast_signed).collect();
        arrays.insert(COURSE.to_owned(), Array::flat(course));
        for (at, (layer, best)) in layers(learners).zip(standing).enumerate() {
            let (moved, factors, codes) = fetched(layer, best).map_err(WeightsError::from)?;
            for (part, values) in moved.into_iter().chain(factors) {
                arrays.insert(name(at, part), Array::flat(values));
            }
            arrays.insert(name(at, "best.codes"), Array::flat(codes));
            arrays.insert(name(at, BEGAN), Array::flat(layer.began().to_vec()));
        }
        kept::store(&self.path, &arrays).map_err(|error| Error::state(&self.path, &error))?;
        *last = Instant::now();
        Ok(())
    }

    /// Where an earlier run's steps stood; layers stand there then. They are left alone where nothing of use is there.
    pub(super) fn resume(&self, learners: &mut [Learner], most: usize) -> Result<Option<Course>, Error> {
        let Some((steps, best, found)) = self.found(learners, most) else { return Ok(None) };
        let mut standing = Vec::new();
        for (layer, Found { positions, factors, best }) in layers(learners).zip(found) {
            standing.push(layer.stood(best.0, best.1).map_err(WeightsError::from)?);
            layer.go_on(positions, factors).map_err(WeightsError::from)?;
        }
        Ok(Some(Course { steps, best, standing }))
    }

    /// What an earlier run has left of these layers: steps, the best of them, each layer's numbers.
    fn found(&self, learners: &mut [Learner], most: usize) -> Option<(usize, Learned, Vec<Found>)> {
        let mut arrays = kept::load(&self.path).ok()?;
        let course = taken(&mut arrays, COURSE, 4, Array::into_i64)?;
        let (steps, step) = (usize::try_from(course[0]).ok()?, usize::try_from(course[1]).ok()?);
        let error = |at: usize| f64::from_bits(course[at].cast_unsigned());
        let best = Learned { before: error(2), best: error(3), step };
        let mut found = Vec::new();
        for (at, layer) in layers(learners).enumerate() {
            let (weights, groups) = layer.counts();
            // Steps that began elsewhere, or by another engine, are no steps of this layer.
            taken(&mut arrays, &name(at, BEGAN), 32, Array::into_u8).filter(|own| own == layer.began())?;
            let mut values = |part, count| taken(&mut arrays, &name(at, part), count, Array::into_f32);
            let positions = values("positions", weights)?;
            let factors = [values("low", groups)?, values("high", groups)?];
            let best = [values("best.low", groups)?, values("best.high", groups)?];
            let codes = taken(&mut arrays, &name(at, "best.codes"), weights, Array::into_u8)?;
            found.push(Found { positions, factors, best: (codes, best) });
        }
        (arrays.is_empty() && steps <= most && step <= steps).then_some((steps, best, found))
    }

    /// The block is done.
    pub(crate) fn remove(&self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use mlx_format::{FloatType, Scheme};
    use mlx_quant_engine::rounding::Rounded;
    use mlx_quant_engine::{Tensor, cpu};

    use super::super::learner::Expert;
    use super::*;

    fn learners(weights: usize) -> Vec<Learner> {
        learners_on(weights, 0.5)
    }

    fn learners_on(weights: usize, scale: f32) -> Vec<Learner> {
        let rounded = Rounded {
            scheme: Scheme::affine(2, 32).unwrap(),
            columns: 64,
            codes: (0..weights).map(|at| (at % 4) as u8).collect(),
            scales: vec![scale; weights / 32],
            biases: vec![-1.0; weights / 32],
        };
        let above: Vec<f32> = (0..weights).map(|at| at as f32 / weights as f32 - 0.5).collect();
        let layer = Layer::new(rounded, FloatType::F32, &above, &cpu()).unwrap();
        vec![Learner::new("a", (None, Expert::Learns(layer)))]
    }

    fn first(learners: &mut [Learner]) -> &mut Layer {
        layers(learners).next().unwrap()
    }

    fn decoded(learners: &mut [Learner]) -> Vec<f32> {
        first(learners).decoded().unwrap().to_vec().unwrap()
    }

    /// The next step meets the numbers that it would have met.
    #[test]
    fn what_was_written_goes_on_and_nothing_else_does() {
        let directory = tempfile::tempdir().unwrap();
        let kept = Kept { path: directory.path().join("steps"), every: Duration::MAX };
        let mut learns = learners(128);
        let slopes = (0..128).map(|at| (at % 7) as f32 - 3.0).collect();
        let slopes = Tensor::from_vec(slopes, (2, 64), &cpu()).unwrap();
        first(&mut learns).step(&slopes, 0.3).unwrap();
        let standing = vec![first(&mut learns).standing().unwrap()];
        first(&mut learns).step(&slopes, 0.3).unwrap();
        let best = Learned { before: 0.1 + 0.2, best: 1e-9 / 3.0, step: 1 };
        let course = Course { steps: 2, best, standing };
        let mut last = Instant::now();
        kept.write(&mut learns, &course, (&mut last, false)).unwrap();
        assert!(!kept.path.exists(), "it was not time");
        kept.write(&mut learns, &course, (&mut last, true)).unwrap();
        let mut again = learners(128);
        let found = kept.resume(&mut again, 2).unwrap().unwrap();
        assert_eq!((found.steps, found.best.step), (2, 1));
        assert_eq!((found.best.before, found.best.best), (best.before, best.best));
        for layer in [first(&mut learns), first(&mut again)] {
            layer.step(&slopes, 0.2).unwrap();
        }
        assert_eq!(decoded(&mut learns), decoded(&mut again));
        let stood = |learners: &mut Vec<Learner>, standing: &Standing| {
            first(learners).restore(standing.clone()).unwrap();
            decoded(learners)
        };
        assert_eq!(stood(&mut learns, &course.standing[0]), stood(&mut again, &found.standing[0]));
        // More steps than are wanted, other layers, layers that began on another grid, a damaged file.
        let before = decoded(&mut again);
        assert!(kept.resume(&mut again, 1).unwrap().is_none());
        assert!(kept.resume(&mut learners(64), 2).unwrap().is_none());
        assert!(kept.resume(&mut learners_on(128, 0.25), 2).unwrap().is_none());
        let bytes = std::fs::read(&kept.path).unwrap();
        std::fs::write(&kept.path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(kept.resume(&mut again, 2).unwrap().is_none());
        assert_eq!(decoded(&mut again), before, "left alone");
        kept.remove();
        assert!(kept.resume(&mut again, 2).unwrap().is_none());
    }
}

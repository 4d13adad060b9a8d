//! DWQ as a part of a run: on what a recipe has made, or on a model that is quantized already.

use std::time::Instant;

use mlx_format::checkpoint::{Destination, Writer};

use super::{Computed, QuantizeSettings, Quantized, conclude, run_line};
use crate::carry::Carrier;
use crate::convert::{keep_apart, open_writer, write_companions};
use crate::data::{Shares, TrainingShares, VALIDATION_WINDOWS, Windows};
use crate::device::Device;
use crate::dwq::{Distillation, Distilled};
use crate::observer::{Event, Observer, Step, StepPart, Within};
use crate::plan::Plan;
use crate::{Error, Model, threads_or_all};

/// Trains scales and biases of `student`, an MLX quantized model from wherever it came, and writes the result into the
/// directory `target`. `plan` copies the student. Without a `teacher`, [`crate::dwq::DwqSettings::target_dir`] has to
/// hold its targets.
///
/// # Errors
/// As [`crate::quantize`]; a student that is no form of the teacher.
pub fn distill<'d>(
    teacher: Option<&Model>,
    student: &Model,
    plan: &Plan,
    windows: &Windows,
    target: impl Into<Destination<'d>>,
    settings: &QuantizeSettings,
    observer: &dyn Observer,
) -> Result<Quantized, Error> {
    let start = Instant::now();
    observer.event(Event::Job { steps: &steps_of_distilling(settings) });
    let observer: &dyn Observer = &Within(observer);
    let target = target.into();
    keep_apart(target, teacher.into_iter().chain([student]))?;
    let companions = student.companions()?;
    let threads = threads_or_all(settings.threads);
    let pool = crate::threads::pool(threads)?;
    let (training, held_out) = lessons(windows, settings)?;
    crate::dwq::check(teacher, student, (&training, &held_out), target.path, &settings.dwq)?;
    let teacher_hash = teacher.map(Model::hash).transpose()?.unwrap_or_default();
    let mut run = run_line(student, plan, windows, settings)?;
    run.identity = format!("{} taught by {teacher_hash}", run.identity);
    let mut writer = open_writer(target, plan, run.run(), observer)?;
    let carrier = Carrier { model: student, plan, pool: &pool, observer, search: None, careful: None };
    let items = 0..plan.items.len();
    let carried = carrier.carry(&mut writer, items.clone());
    if let Err(error) = carried {
        if error.is_refusal() {
            writer.discard_if_fresh()?;
        }
        return Err(error);
    }
    writer.record(items.map(|item| plan.items[item].first_output))?;
    write_companions(&writer, student, plan, companions)?;
    // What goes wrong from here on leaves the work resumable.
    let distilled = train(teacher, &student.device, &writer, windows, settings, &pool, observer)?;
    let made = Quantized {
        distilled: Some(distilled),
        quantize_seconds: start.elapsed().as_secs_f64(),
        engines: Computed::of(&writer, &[]),
        ..Quantized::default()
    };
    conclude(teacher, plan, windows, settings, (made, start), writer, observer)
}

/// The steps of [`distill`].
pub fn steps_of_distilling(settings: &QuantizeSettings) -> Vec<Step> {
    let copy = Step::new("copy", [StepPart::WRITE]);
    let evaluation = settings.evaluate.is_some().then(|| crate::evaluate::step(true));
    [copy, crate::dwq::step()].into_iter().chain(evaluation).collect()
}

/// Computes the teacher's targets into [`crate::dwq::DwqSettings::target_dir`], or its hidden states into
/// [`crate::dwq::DwqSettings::teacher_states`], as far as they are not there.
///
/// # Errors
/// No [`QuantizeSettings::lessons`] or no directory; one of other data or another model; otherwise as
/// [`crate::quantize`].
pub fn targets(teacher: &Model, settings: &QuantizeSettings, observer: &dyn Observer) -> Result<(), Error> {
    observer.event(Event::Job { steps: &[Step::new("targets", ["teacher"])] });
    let threads = threads_or_all(settings.threads);
    let pool = crate::threads::pool(threads)?;
    let missing = |what: &str| Error::Targets { path: "targets".to_owned(), reason: format!("no {what}") };
    let (training, held_out) = settings.lessons.as_ref().ok_or_else(|| missing("windows"))?;
    let distillation = Distillation { settings: &settings.dwq, training, held_out, pool: &pool, observer };
    distillation.targets(teacher)
}

/// Windows of the training, and windows on which its steps are judged.
pub(super) fn lessons(windows: &Windows, settings: &QuantizeSettings) -> Result<(Windows, Windows), Error> {
    if let Some(lessons) = &settings.lessons {
        return Ok(lessons.clone());
    }
    let all = TrainingShares { windows: 0, validation: VALIDATION_WINDOWS };
    let split = Shares { calibration: 0, training: Some(all) }.split(windows.picked.len())?;
    let (training, validation) = split.training.unwrap_or_default();
    Ok((windows.part(training), windows.part(validation)))
}

/// Trains what stands in the writer's directory.
pub(super) fn train(
    teacher: Option<&Model>,
    device: &Device,
    writer: &Writer,
    windows: &Windows,
    settings: &QuantizeSettings,
    pool: &rayon::ThreadPool,
    observer: &dyn Observer,
) -> Result<Distilled, Error> {
    let student = crate::open(&mlx_format::checkpoint::Directory::open(writer.partial())?)?.on(device);
    let (training, held_out) = &lessons(windows, settings)?;
    let distillation = Distillation { settings: &settings.dwq, training, held_out, pool, observer };
    let trained = distillation.run(teacher, &student, writer)?;
    // Its files are mapped, and are written to now.
    drop(student);
    trained.write(writer)?;
    Ok(trained.distilled)
}

//! The figures: KL of the methods at one width as dots, at several widths as lines, and the course of dwq.

use kuva::prelude::{Layout, LinePlot, Plot, ScatterPlot};

use mlx_quant::compare::{Comparison, Entry};

use super::canvas::{LETTER, LIGHT, Name, Size, draw, layout, standalone};
use super::rows::{in_order, widths};
use super::style::{Style, method};

/// Error bars are so many standard errors long, on both sides.
const ERRORS: f64 = 2.0;

/// A line of a figure.
struct Series {
    name: String,
    style: Style,
    /// x, y and half the length of the error bar, from left to right.
    points: Vec<(f64, f64, f64)>,
}

/// KL of every method: one width as dots, several as lines against size.
pub(super) fn size_plot(comparison: &Comparison, size: Size) -> String {
    kl_plot(comparison, size, None)
}

/// The same as a file of its own, with a title, for light and dark grounds.
pub fn comparison_svg(comparison: &Comparison) -> String {
    let title = match widths(comparison).as_slice() {
        [bits] => format!("{}: KL to the original at {bits} bits", comparison.model),
        _ => format!("{}: KL to the original by size", comparison.model),
    };
    standalone(&kl_plot(comparison, Size::Wide, Some(&title)))
}

fn kl_plot(comparison: &Comparison, size: Size, title: Option<&str>) -> String {
    if widths(comparison).len() > 1 { lines(comparison, size, title) } else { dots(comparison, size, title) }
}

/// Half the length of the error bar.
fn error(entry: &Entry) -> f64 {
    entry.against().kl_stderr.unwrap_or(0.0) * ERRORS
}

fn titled(layout: Layout, title: Option<&str>) -> Layout {
    match title {
        Some(title) => layout.with_title(title),
        None => layout,
    }
}

/// The best at the top, KL from 0 on.
fn dots(comparison: &Comparison, size: Size, title: Option<&str>) -> String {
    let entries: Vec<&Entry> = in_order(comparison).map(|(_, entry)| entry).collect();
    let count = entries.len();
    let plot = |(at, entry): (usize, &&Entry)| -> Plot {
        let style = Style::of(&entry.recipe);
        ScatterPlot::new()
            .with_data(vec![(entry.kl(), (count - at) as f64)])
            .with_x_err(vec![error(entry)])
            .with_color(style.color)
            .with_marker(style.marker)
            .with_size(5.0)
            .into()
    };
    let plots: Vec<Plot> = entries.iter().enumerate().map(plot).collect();
    // kuva names rows from the bottom.
    let names: Vec<String> = entries.iter().rev().map(|entry| method(&entry.recipe).to_owned()).collect();
    let most = entries.iter().map(|entry| entry.kl() + error(entry)).fold(f64::MIN_POSITIVE, f64::max);
    let height = 70.0 + 28.0 * count as f64 + if title.is_some() { 30.0 } else { 0.0 };
    let arranged = |plots: &[Plot]| {
        let layout = layout(plots, size, height)
            .with_y_categories(names.clone())
            .with_x_label(axis("KL to the original, nats a token", size))
            .with_x_axis_min(0.0)
            .with_x_axis_max(most * if size == Size::Wide { 1.12 } else { 1.6 })
            .with_y_axis_min(0.4)
            .with_y_axis_max(count as f64 + 0.6);
        titled(layout, title)
    };
    let value = |(at, entry): (usize, &&Entry)| Name {
        text: format!("{:.4}", entry.kl()),
        color: LIGHT.text,
        end: (entry.kl() + error(entry), (count - at) as f64),
        in_margin: false,
    };
    let values: Vec<Name> = entries.iter().enumerate().map(value).collect();
    draw(plots, arranged, &values, &format!("KL to the original of {count} methods, the best first"))
}

/// On a phone the words around a number have to be few.
fn axis(words: &str, size: Size) -> String {
    let short = words.split(',').next().unwrap_or(words);
    if size == Size::Narrow { short } else { words }.to_owned()
}

/// One line for each method, KL by powers because a bit less costs several times as much.
fn lines(comparison: &Comparison, size: Size, title: Option<&str>) -> String {
    let mut series: Vec<Series> = Vec::new();
    for (_, entry) in in_order(comparison) {
        let name = method(&entry.recipe);
        let point = (entry.bits_per_weight, entry.kl().max(1e-9), error(entry));
        match series.iter_mut().find(|series| series.name == name) {
            Some(series) => series.points.push(point),
            None => series.push(Series {
                name: name.to_owned(),
                style: Style::of(&entry.recipe),
                points: vec![point],
            }),
        }
    }
    let axes = Axes { x: "bits per weight", y: "KL to the original, nats a token", by_powers: true };
    draw_lines(&series, &axes, size, title, &axes_label(&series))
}

fn axes_label(series: &[Series]) -> String {
    format!("KL to the original against bits per weight, a line for each of {} methods", series.len())
}

/// What axes say.
struct Axes {
    x: &'static str,
    y: &'static str,
    /// Whether equal steps of y are equal factors.
    by_powers: bool,
}

fn draw_lines(series: &[Series], axes: &Axes, size: Size, title: Option<&str>, label: &str) -> String {
    let mut plots: Vec<Plot> = Vec::new();
    for one in series {
        let points: Vec<(f64, f64)> = one.points.iter().map(|(x, y, _)| (*x, *y)).collect();
        if points.len() > 1 {
            let line = LinePlot::new().with_data(points.clone()).with_color(one.style.color);
            plots.push(line.with_stroke_width(1.5).into());
        }
        // By powers an error bar must not reach 0.
        let errors: Vec<f64> = one.points.iter().map(|(_, y, error)| error.min(y * 0.9)).collect();
        let marks = ScatterPlot::new()
            .with_data(points)
            .with_color(one.style.color)
            .with_marker(one.style.marker)
            .with_size(4.5);
        let errors_known = errors.iter().any(|error| *error > 0.0);
        plots.push(if errors_known { marks.with_y_err(errors) } else { marks }.into());
    }
    let all = || series.iter().flat_map(|one| one.points.iter().copied());
    let (left, right) = range(all().map(|(x, ..)| x));
    let ends = all().flat_map(|(_, y, error)| [(y - error).max(y * 0.5), y + error]);
    let (low, high) = if axes.by_powers { powers(ends) } else { range(ends) };
    // On a phone the names stand below, in the page.
    let names: Vec<Name> = if size == Size::Wide {
        series
            .iter()
            .filter_map(|one| one.points.last().map(|last| (one, last)))
            .map(|(one, (x, y, _))| Name {
                text: one.name.clone(),
                color: one.style.color,
                end: (*x, *y),
                in_margin: true,
            })
            .collect()
    } else {
        Vec::new()
    };
    let room = names
        .iter()
        .map(|name| name.text.chars().count())
        .max()
        .map_or(14.0, |most| most as f64 * LETTER + 28.0);
    let height = if size == Size::Wide { 400.0 } else { 300.0 } + if title.is_some() { 30.0 } else { 0.0 };
    let arranged = |plots: &[Plot]| {
        let layout = layout(plots, size, height)
            .with_x_label(axis(axes.x, size))
            .with_y_label(axis(axes.y, size))
            .with_x_axis_min(left)
            .with_x_axis_max(right)
            .with_y_axis_min(low)
            .with_y_axis_max(high)
            .with_force_margins(64.0, room);
        let layout = if axes.by_powers { layout.with_log_y() } else { layout };
        titled(layout, title)
    };
    draw(plots, arranged, &names, label)
}

/// From the least to the most and a little more.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) =
        values.fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)));
    let margin = ((high - low) * 0.05).max(high.abs() * 1e-3);
    (low - margin, high + margin)
}

fn powers(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = range(values.map(f64::ln));
    (low.exp(), high.exp())
}

/// KL on dwq's own held-out windows at every look; names of entries, because recipes at several widths are several.
fn courses(comparison: &Comparison) -> Vec<Series> {
    let known = in_order(comparison).filter_map(|(_, entry)| Some((entry, entry.distilled.as_ref()?)));
    let course = |(entry, distilled): (&Entry, &mlx_quant::dwq::Distilled)| Series {
        name: entry.name.clone(),
        style: Style::of(&entry.recipe),
        points: distilled
            .held_out
            .iter()
            .filter(|(_, kl)| kl.is_finite() && *kl > 0.0)
            .map(|(step, kl)| (*step as f64, *kl, 0.0))
            .collect(),
    };
    known.map(course).filter(|series| series.points.len() > 1).collect()
}

/// The course of dwq, if something was trained.
pub(super) fn training_plot(comparison: &Comparison, size: Size) -> Option<String> {
    let series = courses(comparison);
    if series.is_empty() {
        return None;
    }
    let several = widths(comparison).len() > 1;
    let axes = Axes { x: "step", y: "KL on its held-out windows", by_powers: several };
    Some(draw_lines(&series, &axes, size, None, "KL on held-out windows by step of dwq"))
}

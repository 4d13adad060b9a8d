//! Plots as SVG, drawn by kuva.

use kuva::plot::scatter::MarkerShape;
use kuva::prelude::{ColorMap, Heatmap, Layout, LegendPosition, LinePlot, Plot, ScatterPlot};

use mlx_quant::compare::{Comparison, Entry};

use super::layers::Grid;

/// Colours that people with any colour vision tell apart (Okabe and Ito), light and dark alike.
const COLORS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f"];
const MARKERS: [MarkerShape; 7] = [
    MarkerShape::Circle,
    MarkerShape::Square,
    MarkerShape::Triangle,
    MarkerShape::Diamond,
    MarkerShape::TriangleDown,
    MarkerShape::Star,
    MarkerShape::Pentagon,
];
const WIDTH: f64 = 760.0;

fn draw(plots: Vec<Plot>, layout: Layout, height: f64, label: &str) -> String {
    let svg = kuva::render_to_svg(plots, layout.with_width(WIDTH).with_height(height));
    // kuva states the size only; a view box lets the page scale it.
    let sized = format!("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\"");
    let scaled = format!("{sized} viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{label}\"");
    svg.replacen(&sized, &scaled, 1)
}

/// Recipes in the order in which they ran, with their entries from small to large.
fn series(comparison: &Comparison) -> Vec<(&str, Vec<&Entry>)> {
    let mut series: Vec<(&str, Vec<&Entry>)> = Vec::new();
    for entry in &comparison.entries {
        match series.iter_mut().find(|(recipe, _)| *recipe == entry.recipe) {
            Some((_, entries)) => entries.push(entry),
            None => series.push((&entry.recipe, vec![entry])),
        }
    }
    for (_, entries) in &mut series {
        entries.sort_by(|a, b| a.bits_per_weight.total_cmp(&b.bits_per_weight));
    }
    series
}

fn label(recipe: &str) -> String {
    if recipe == "rtn" { "basic".to_owned() } else { recipe.to_owned() }
}

/// KL against bits per weight, both of everything that was measured and of what dynamic is predicted to reach at other sizes.
pub fn size_plot(comparison: &Comparison) -> String {
    let mut plots: Vec<Plot> = Vec::new();
    let measured = || comparison.entries.iter().map(|entry| (entry.bits_per_weight, entry.kl().max(1e-9)));
    // As far as the measured points reach, and a little more.
    let (low, high) =
        measured().fold((f64::MAX, f64::MIN), |(low, high), (bits, _)| (low.min(bits), high.max(bits)));
    let near: Vec<(f64, f64)> = comparison
        .predicted
        .iter()
        .copied()
        .filter(|(bits, kl)| *bits >= low - 1.0 && *bits <= high + 1.0 && *kl > 0.0)
        .collect();
    if near.len() > 1 {
        let line = LinePlot::new().with_data(near).with_color("#999999").with_dashed();
        plots.push(line.with_legend("predicted: dynamic+search").into());
    }
    let front: Vec<(f64, f64)> = comparison
        .rankings
        .pareto
        .iter()
        .map(|index| &comparison.entries[*index])
        .map(|entry| (entry.bits_per_weight, entry.kl().max(1e-9)))
        .collect();
    if front.len() > 1 {
        plots.push(
            LinePlot::new().with_data(front.clone()).with_color("#b8860b").with_stroke_width(1.0).into(),
        );
    }
    let ring =
        ScatterPlot::new().with_data(front).with_color("#f0c000").with_size(10.0).with_marker_opacity(0.35);
    plots.push(ring.with_legend("Pareto front").into());
    for (at, (recipe, entries)) in series(comparison).into_iter().enumerate() {
        let points: Vec<(f64, f64)> =
            entries.iter().map(|entry| (entry.bits_per_weight, entry.kl().max(1e-9))).collect();
        // On a logarithmic axis an error bar must not reach 0.
        let errors: Vec<f64> = entries
            .iter()
            .map(|entry| entry.against().kl_stderr.unwrap_or(0.0).min(entry.kl() * 0.9))
            .collect();
        let plot = ScatterPlot::new()
            .with_data(points)
            .with_y_err(errors)
            .with_color(COLORS[at % COLORS.len()])
            .with_marker(MARKERS[at % MARKERS.len()])
            .with_size(5.0)
            .with_legend(label(recipe));
        plots.push(plot.into());
    }
    let layout = Layout::auto_from_plots(&plots)
        .with_log_y()
        .with_x_label("bits per weight")
        .with_y_label("KL to the original, nats a token")
        .with_legend_position(LegendPosition::OutsideRightTop)
        .with_legend_box(false);
    draw(plots, layout, 420.0, "KL to the original against bits per weight, by method")
}

/// KL of each layer alone at the scheme of the comparison, as powers of ten.
pub(super) fn sensitivity_plot(comparison: &Comparison) -> Option<String> {
    let known = comparison.sensitivities.iter().filter_map(|layer| Some((layer.path.clone(), layer.kl?)));
    let grid = Grid::of(known.filter(|(_, kl)| *kl > 0.0));
    let least = comparison
        .sensitivities
        .iter()
        .filter_map(|layer| layer.kl)
        .filter(|kl| *kl > 0.0)
        .reduce(f64::min)?;
    if grid.rows.is_empty() || grid.blocks.is_empty() {
        return None;
    }
    let (mut rows, mut names) = (Vec::new(), Vec::new());
    // The lowest row is drawn first.
    for (kind, figures) in grid.rows.iter().rev() {
        names.push(kind.clone());
        rows.push(figures.iter().map(|kl| kl.unwrap_or(least).log10()).collect::<Vec<f64>>());
    }
    let count = names.len();
    let blocks: Vec<String> = grid.blocks.iter().map(ToString::to_string).collect();
    let map = Heatmap::new().with_data(rows).with_color_map(ColorMap::Viridis).with_legend("log10 KL");
    let plots: Vec<Plot> = vec![map.into()];
    // A label for every block fits for a while.
    let every = blocks.len().div_ceil(32);
    let blocks =
        blocks.into_iter().enumerate().map(|(at, block)| if at % every == 0 { block } else { String::new() });
    let layout = Layout::auto_from_plots(&plots)
        .with_x_categories(blocks.collect())
        .with_y_categories(names)
        .with_x_label("block")
        .with_show_grid(false);
    Some(draw(plots, layout, 110.0 + 26.0 * count as f64, "Sensitivity by kind of layer and block"))
}

/// KL on dwq's own held-out windows at every look.
pub(super) fn training_plot(comparison: &Comparison) -> Option<String> {
    let mut plots: Vec<Plot> = Vec::new();
    for (at, entry) in comparison.entries.iter().enumerate() {
        let Some(distilled) = &entry.distilled else { continue };
        let points: Vec<(f64, f64)> = distilled
            .held_out
            .iter()
            .filter(|(_, kl)| kl.is_finite() && *kl > 0.0)
            .map(|(step, kl)| (*step as f64, *kl))
            .collect();
        if points.len() < 2 {
            continue;
        }
        let color = COLORS[at % COLORS.len()];
        plots.push(
            LinePlot::new()
                .with_data(points.clone())
                .with_color(color)
                .with_legend(entry.name.clone())
                .into(),
        );
        let kept = points.iter().copied().filter(|(step, _)| *step as usize == distilled.best_step);
        plots.push(ScatterPlot::new().with_data(kept).with_color(color).with_size(5.0).into());
    }
    if plots.is_empty() {
        return None;
    }
    let layout = Layout::auto_from_plots(&plots)
        .with_x_label("step")
        .with_y_label("KL on its held-out windows")
        .with_legend_position(LegendPosition::OutsideRightTop)
        .with_legend_box(false);
    Some(draw(plots, layout, 320.0, "KL on held-out windows by step of dwq"))
}

//! Plots as SVG: kuva draws axes, markers and lines; names are put where lines end; one figure reads on a light and on a
//! dark ground.

use std::fmt::Write as _;
use std::sync::Arc;

use kuva::prelude::{Layout, Plot, SvgBackend, Theme, TickFormat, render_multiple};
use kuva::render::color::Color;
use kuva::render::layout::ComputedLayout;
use kuva::render::render::{Primitive, TextAnchor};

/// Colours of everything but methods.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ground {
    pub(super) back: &'static str,
    pub(super) text: &'static str,
    pub(super) soft: &'static str,
    pub(super) line: &'static str,
}

pub(super) const LIGHT: Ground =
    Ground { back: "#ffffff", text: "#1b1f24", soft: "#59636e", line: "#d1d9e0" };
pub(super) const DARK: Ground = Ground { back: "#0d1117", text: "#e6edf3", soft: "#9aa4b0", line: "#3d444d" };

/// Size of letters.
pub(super) const LETTERS: u32 = 12;
/// Room that a letter takes, on average: wide enough for names of methods in any of the fonts.
pub(super) const LETTER: f64 = 7.8;

/// How wide a figure is: beside text, or on a phone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Size {
    Wide,
    Narrow,
}

impl Size {
    pub(super) const fn width(self) -> f64 {
        match self {
            Self::Wide => 760.0,
            Self::Narrow => 348.0,
        }
    }
}

/// Words beside what they are about.
#[derive(Clone, Debug)]
pub(super) struct Name {
    pub(super) text: String,
    pub(super) color: &'static str,
    /// Where that ends, in the units of the axes.
    pub(super) end: (f64, f64),
    /// In the margin, all below each other and moved apart where they would touch; otherwise where it ends.
    pub(super) in_margin: bool,
}

/// A layout of this size with plain decimals at its axes.
pub(super) fn layout(plots: &[Plot], size: Size, height: f64) -> Layout {
    let theme = Theme {
        background: LIGHT.back.into(),
        axis_color: LIGHT.soft.into(),
        grid_color: LIGHT.line.into(),
        tick_color: LIGHT.soft.into(),
        text_color: LIGHT.text.into(),
        legend_bg: LIGHT.back.into(),
        legend_border: LIGHT.line.into(),
        ..Theme::light()
    };
    Layout::auto_from_plots(plots)
        .with_width(size.width())
        .with_height(height)
        .with_theme(theme)
        .with_tick_format(TickFormat::Custom(Arc::new(plain)))
        .with_tick_size(LETTERS)
        .with_label_size(LETTERS + 1)
        .with_title_size(LETTERS + 3)
        .with_ticks(if size == Size::Wide { 8 } else { 4 })
}

/// `0.05`, `4.5`, `20`: no exponents, no zeros at the end.
fn plain(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Draws. `layout` is called twice: kuva keeps what it draws with, and names are placed by the same one.
pub(super) fn draw(
    plots: Vec<Plot>,
    layout: impl Fn(&[Plot]) -> Layout,
    names: &[Name],
    label: &str,
) -> String {
    let computed = ComputedLayout::from_layout(&layout(&plots));
    let own = layout(&plots);
    let mut scene = render_multiple(plots, own);
    for (name, y) in names.iter().zip(spread(names, &computed)) {
        let end = (computed.map_x(name.end.0) + 7.0, computed.map_y(name.end.1));
        let x = if name.in_margin { computed.width - computed.margin_right + 18.0 } else { end.0 + 2.0 };
        if name.in_margin {
            scene.add(Primitive::Line {
                x1: end.0,
                y1: end.1,
                x2: x - 4.0,
                y2: y,
                stroke: Color::from(name.color),
                stroke_width: 0.8,
                stroke_dasharray: None,
            });
        }
        scene.add(Primitive::Text {
            x,
            y: y + f64::from(LETTERS) * 0.35,
            content: name.text.clone(),
            size: LETTERS,
            anchor: TextAnchor::Start,
            rotate: None,
            bold: false,
            color: Some(Color::from(name.color)),
        });
    }
    let svg = SvgBackend.render_scene(&scene);
    // kuva states the size only; a view box lets a page scale it. Words for those who do not see it.
    let size = format!("width=\"{}\" height=\"{}\"", computed.width, computed.height);
    let scaled =
        format!("{size} viewBox=\"0 0 {} {}\" class=\"mq\" role=\"img\"", computed.width, computed.height);
    let svg = svg.replacen(&size, &scaled, 1);
    let title = format!("><title>{}</title>", escape(label));
    svg.replacen('>', &title, 1)
}

/// Heights of names, in pixels: those of the ends, moved apart where letters would touch.
fn spread(names: &[Name], computed: &ComputedLayout) -> Vec<f64> {
    let step = f64::from(LETTERS) * 1.3;
    if names.iter().any(|name| !name.in_margin) {
        return names.iter().map(|name| computed.map_y(name.end.1)).collect();
    }
    let mut order: Vec<usize> = (0..names.len()).collect();
    order.sort_by(|a, b| computed.map_y(names[*a].end.1).total_cmp(&computed.map_y(names[*b].end.1)));
    let mut heights: Vec<f64> = order.iter().map(|at| computed.map_y(names[*at].end.1)).collect();
    for at in 1..heights.len() {
        heights[at] = heights[at].max(heights[at - 1] + step);
    }
    // What was pushed below the axis pushes back.
    let lowest = computed.height - computed.margin_bottom;
    for at in (0..heights.len()).rev() {
        let limit = if at + 1 == heights.len() { lowest } else { heights[at + 1] - step };
        heights[at] = heights[at].min(limit);
    }
    let mut places = vec![0.0; names.len()];
    for (at, height) in order.into_iter().zip(heights) {
        places[at] = height;
    }
    places
}

/// Rules that turn a figure for a dark ground where the reader wants one; elsewhere it is light.
pub(super) fn dark_rules() -> String {
    let mut rules = String::from("@media (prefers-color-scheme: dark) {");
    let pairs =
        [(LIGHT.back, DARK.back), (LIGHT.text, DARK.text), (LIGHT.soft, DARK.soft), (LIGHT.line, DARK.line)];
    for (light, dark) in pairs {
        for what in ["fill", "stroke"] {
            let _ = write!(rules, " .mq[{what}=\"{light}\"], .mq [{what}=\"{light}\"] {{ {what}: {dark}; }}");
        }
    }
    rules.push_str(" }");
    rules
}

/// A figure as a file of its own.
pub(super) fn standalone(svg: &str) -> String {
    svg.replacen("</title>", &format!("</title><style>{}</style>", dark_rules()), 1)
}

/// Text between tags.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_are_plain() {
        let cases =
            [(0.05, "0.05"), (0.000_5, "0.0005"), (4.5, "4.5"), (20.0, "20"), (0.1 + 0.2, "0.3"), (0.0, "0")];
        for (value, text) in cases {
            assert_eq!(plain(value), text);
        }
    }
}

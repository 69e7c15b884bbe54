//! The health of an adapter's modules as a drawing.

use std::collections::{BTreeMap, BTreeSet};

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::health::ModuleHealth;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<<SVGBackend<'static> as DrawingBackend>::ErrorType>>;

const WIDTH: i32 = 1000;
const MARGIN: i32 = 24;
/// Above the cells: title, scale, names of the columns.
const HEAD: i32 = 128;
/// Left of the cells: layers.
const SIDE: i32 = 64;
const ROW: i32 = 20;
/// A column, at most.
const COLUMN: i32 = 120;
const CURVES: i32 = 360;
/// Right of the curves: names of the lines.
const LEGEND: i32 = 170;
const INK: RGBColor = RGBColor(38, 38, 38);
const ALARM: RGBColor = RGBColor(200, 30, 30);
/// Stands out from pale and dark cells.
const FRAME: RGBColor = RGBColor(245, 90, 60);
const EMPTY: RGBColor = RGBColor(232, 232, 232);

/// Modules in a grid of layers and kinds.
struct Grid<'a> {
    /// Numbers of layers, `None` for a name without one.
    layers: Vec<Option<u64>>,
    /// What the names have before and after the number, in the order of the modules.
    kinds: Vec<(&'a str, &'a str)>,
    /// By row and column.
    cells: BTreeMap<(usize, usize), &'a ModuleHealth>,
}

/// An SVG document: a cell for each module, by layer (the first number within its dotted name) and kind, coloured by the update's norm
/// relative to the base's, with the count of its intruders where it has any; and below, how the updates' squared norm adds up
/// over their singular values, a line for each module in the colour of its kind.
pub fn svg(health: &[ModuleHealth], title: &str) -> String {
    let grid = Grid::new(health);
    let table = HEAD + ROW * grid.layers.len() as i32 + MARGIN;
    let mut out = String::new();
    {
        let root = SVGBackend::with_string(&mut out, (WIDTH as u32, (table + CURVES) as u32)).into_drawing_area();
        let drawn = root.fill(&WHITE).and_then(|()| {
            let (above, below) = root.split_vertically(table);
            head(&above, &grid, health, &printable(title))?;
            cells(&above, &grid)?;
            curves(&below, &grid)?;
            root.present()
        });
        // A string takes everything that is drawn.
        drawn.expect("drawing into a string");
    }
    out
}

/// XML has no control characters.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// The name before its first dotted part that is a number, the number, and the name after it.
fn split(name: &str) -> (&str, Option<u64>, &str) {
    let mut from = 0;
    for part in name.split('.') {
        if let Ok(layer) = part.parse() {
            return (&name[..from], Some(layer), name[from + part.len()..].trim_start_matches('.'));
        }
        from += part.len() + 1;
    }
    ("", None, name)
}

impl<'a> Grid<'a> {
    fn new(health: &'a [ModuleHealth]) -> Self {
        let names: Vec<_> = health.iter().map(|m| split(&m.name)).collect();
        let layers: Vec<_> = names.iter().map(|n| n.1).collect::<BTreeSet<_>>().into_iter().collect();
        let mut kinds = Vec::new();
        let mut cells = BTreeMap::new();
        for (m, &(before, layer, after)) in health.iter().zip(&names) {
            let kind = kinds.iter().position(|k| *k == (before, after)).unwrap_or_else(|| {
                kinds.push((before, after));
                kinds.len() - 1
            });
            let row = layers.binary_search(&layer).expect("each layer is there");
            cells.insert((row, kind), m);
        }
        Grid { layers, kinds, cells }
    }

    fn label(&self, kind: usize) -> String {
        let (_, after) = self.kinds[kind];
        printable(after.rsplit('.').next().unwrap_or(after))
    }

    fn column(&self) -> i32 {
        ((WIDTH - 2 * MARGIN - SIDE) / self.kinds.len().max(1) as i32).clamp(1, COLUMN)
    }

    fn colour(&self, kind: usize) -> HSLColor {
        HSLColor(kind as f64 / self.kinds.len().max(1) as f64, 0.75, 0.42)
    }
}

fn norm(m: &ModuleHealth) -> f64 {
    m.update.as_ref().map_or(0.0, |u| u.relative_norm)
}

fn intruders(m: &ModuleHealth) -> usize {
    m.intruders.as_ref().map_or(0, |i| i.found.len())
}

/// From a pale yellow for a thousandth or less to a dark blue for 1 or more, by the logarithm.
fn shade(relative: f64) -> RGBColor {
    let x = (1.0 + relative.max(1e-9).log10() / 3.0).clamp(0.0, 1.0);
    let stops = [(255.0, 250.0, 205.0), (90.0, 180.0, 190.0), (20.0, 50.0, 120.0)];
    let (i, t) = if x < 0.5 { (0, 2.0 * x) } else { (1, 2.0 * x - 1.0) };
    let mix = |a: f64, b: f64| (a + t * (b - a)).round() as u8;
    let (a, b) = (stops[i], stops[i + 1]);
    RGBColor(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
}

fn text(area: &Area<'_>, words: &str, at: (i32, i32), size: i32, anchor: HPos, colour: RGBColor) -> Drawn {
    let style = ("sans-serif", size).into_font().color(&colour).pos(Pos::new(anchor, VPos::Center));
    area.draw(&Text::new(words.to_owned(), at, style))
}

fn head(area: &Area<'_>, grid: &Grid<'_>, health: &[ModuleHealth], title: &str) -> Drawn {
    text(area, title, (MARGIN, 26), 20, HPos::Left, INK)?;
    let (hit, count) = health.iter().map(intruders).filter(|&n| n > 0).fold((0, 0), |(h, c), n| (h + 1, c + n));
    let bad = health.iter().filter(|m| !m.not_finite.is_empty()).count();
    let mut line = format!("{} modules; intruders (numbers in red frames): {count} in {hit} modules", health.len());
    if bad > 0 {
        line += &format!("; not finite (!): {bad} modules");
    }
    text(area, &line, (MARGIN, 50), 14, HPos::Left, if bad + hit > 0 { ALARM } else { INK })?;
    text(area, "norm of the update / norm of the base:", (MARGIN, 74), 13, HPos::Left, INK)?;
    for (i, (value, name)) in [(1e-3, ".001"), (1e-2, ".01"), (3e-2, ".03"), (1e-1, ".1"), (3e-1, ".3"), (1.0, "1")].iter().enumerate() {
        let x = MARGIN + 260 + 64 * i as i32;
        area.draw(&Rectangle::new([(x, 66), (x + 22, 82)], shade(*value).filled()))?;
        text(area, name, (x + 28, 74), 13, HPos::Left, INK)?;
    }
    let column = grid.column();
    for kind in 0..grid.kinds.len() {
        let x = MARGIN + SIDE + column * kind as i32 + column / 2;
        // Narrow columns' names take turns at two heights.
        let y = HEAD - 12 - if column < 90 { 14 * (kind as i32 % 2) } else { 0 };
        text(area, &grid.label(kind), (x, y), 13, HPos::Center, INK)?;
    }
    Ok(())
}

fn cells(area: &Area<'_>, grid: &Grid<'_>) -> Drawn {
    let column = grid.column();
    for (row, layer) in grid.layers.iter().enumerate() {
        let name = layer.map_or("other".to_owned(), |l| format!("layer {l}"));
        text(area, &name, (MARGIN + SIDE - 8, HEAD + ROW * row as i32 + ROW / 2), 13, HPos::Right, INK)?;
    }
    for (&(row, kind), m) in &grid.cells {
        let (x, y) = (MARGIN + SIDE + column * kind as i32, HEAD + ROW * row as i32);
        let corners = [(x + 1, y + 1), (x + column - 1, y + ROW - 1)];
        let at = (x + column / 2, y + ROW / 2);
        if !m.not_finite.is_empty() {
            area.draw(&Rectangle::new(corners, ALARM.filled()))?;
            text(area, "!", at, 13, HPos::Center, WHITE)?;
            continue;
        }
        let relative = norm(m);
        let fill = if relative > 0.0 { shade(relative) } else { EMPTY };
        area.draw(&Rectangle::new(corners, fill.filled()))?;
        let n = intruders(m);
        if n > 0 {
            area.draw(&Rectangle::new(corners, FRAME.stroke_width(2)))?;
            // Black or white, whichever stands out.
            let ink = if relative > 0.06 { WHITE } else { INK };
            text(area, &n.to_string(), at, 13, HPos::Center, ink)?;
        }
    }
    Ok(())
}

fn curves(area: &Area<'_>, grid: &Grid<'_>) -> Drawn {
    let lines = grid.cells.iter().filter_map(|(at, m)| Some((at.1, m.update.as_ref().filter(|u| u.norm > 0.0)?)));
    let longest = lines.clone().map(|(_, u)| u.energy.len()).max().unwrap_or(1).max(1);
    let mut chart = ChartBuilder::on(area)
        .caption("share of the update's squared norm within its leading singular values", ("sans-serif", 16))
        .margin(MARGIN)
        .margin_right(LEGEND)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(0..longest, 0.0..1.0)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc("singular values kept")
        .y_label_formatter(&|y| format!("{:.0} %", 100.0 * y))
        .axis_desc_style(("sans-serif", 14))
        .label_style(("sans-serif", 13))
        .draw()?;
    for (kind, u) in lines {
        let points = std::iter::once((0, 0.0)).chain(u.energy.iter().enumerate().map(|(i, &e)| (i + 1, e)));
        chart.draw_series(LineSeries::new(points, grid.colour(kind).mix(0.6).stroke_width(1)))?;
    }
    // As many as there is room for.
    for kind in 0..grid.kinds.len().min(14) {
        let (x, y) = (WIDTH - LEGEND + 14, 60 + 19 * kind as i32);
        area.draw(&PathElement::new([(x, y), (x + 18, y)], grid.colour(kind).stroke_width(3)))?;
        text(area, &grid.label(kind), (x + 24, y), 13, HPos::Left, INK)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::health::{Dimension, Intruders, NotFinite};
    use super::super::update::Update;
    use super::*;

    fn module(name: &str, relative_norm: f64, intruders: usize) -> ModuleHealth {
        let values: Vec<f64> = (0..8).map(|j| 0.7f64.powi(j)).collect();
        let all: f64 = values.iter().map(|s| s * s).sum();
        let energy = (0..8).map(|j| values[..=j].iter().map(|s| s * s).sum::<f64>() / all).collect();
        let update = Update {
            energy,
            values,
            norm: all.sqrt(),
            relative_norm,
            relative_top: 0.1,
            effective_rank: 5.0,
            stable_rank: 2.0,
            numerical_rank: 8,
            rank_90: 4,
            rank_99: 7,
            overlap: 0.2,
            chance: 0.1,
        };
        let found = (0..intruders).map(|index| Dimension { index, sigma: 1.0, cosine: 0.2 }).collect();
        ModuleHealth {
            name: name.to_owned(),
            out: 64,
            inner: 64,
            rank: 8,
            not_finite: Vec::new(),
            scale: None,
            update: Some(update),
            intruders: Some(Intruders { epsilon: 0.5, found, k: 10, counts: vec![(0.5, intruders)] }),
            drift: None,
        }
    }

    #[test]
    fn every_module_has_its_cell() {
        let mut health = Vec::new();
        for layer in [0, 1, 10] {
            health.extend(["q_proj", "v_proj"].map(|kind| module(&format!("model.layers.{layer}.self_attn.{kind}"), 0.05, 0)));
        }
        health[3] = module("model.layers.1.self_attn.v_proj", 0.3, 9);
        health[5].not_finite.push(NotFinite { part: "up", count: 1, row: 0, column: 0 });
        health[5].update = None;
        health.push(module("lm_head", 0.01, 0));
        let drawing = svg(&health, "<a> & \u{1}b");
        assert!(drawing.contains("&lt;a&gt; &amp; ?b"));
        let words: Vec<&str> = drawing.lines().map(str::trim).collect();
        for word in ["layer 0", "layer 1", "layer 10", "other", "9", "!"] {
            assert_eq!(words.iter().filter(|w| **w == word).count(), 1, "{word}");
        }
        let count = |colour: RGBColor| {
            drawing.matches(&format!("fill=\"#{:02X}{:02X}{:02X}\" stroke=\"none\"", colour.0, colour.1, colour.2)).count()
        };
        // Four cells as they were, one with intruders, which the scale shows as well, and one not finite.
        assert_eq!((count(shade(0.05)), count(shade(0.3)), count(ALARM)), (4, 2, 1), "{words:?}");
        // A line for each update.
        assert_eq!(drawing.matches("<polyline fill=\"none\" opacity=\"0.6\"").count(), 6);
        assert_eq!(drawing, svg(&health, "<a> & \u{1}b"));
        assert!(svg(&[], "nothing").contains("0 modules"));
    }

    #[test]
    fn names_are_split_at_the_layer() {
        assert_eq!(split("model.layers.12.mlp.up_proj"), ("model.layers.", Some(12), "mlp.up_proj"));
        assert_eq!(split("lm_head"), ("", None, "lm_head"));
    }
}

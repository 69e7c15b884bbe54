//! The curves of a training, as a table and as a drawing.

use std::fmt::Write;

use plotters::prelude::*;

/// A point of a curve. NaN is no number.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    /// Updates made.
    pub(super) step: u64,
    pub(super) learning_rate: f64,
    /// Mean over the steps since the last row, each on its own batch before its update.
    pub(super) train: f64,
    pub(super) held_out: f64,
}

/// The curve of one layer under one profile.
pub(super) struct Curve<'a> {
    pub(super) profile: &'a str,
    pub(super) layer: usize,
    pub(super) rows: &'a [Row],
}

/// `profile,layer,step,learning rate,train loss,held-out loss`; no number where there is none.
pub(super) fn table(curves: &[Curve<'_>]) -> String {
    let mut out = "profile,layer,step,learning rate,train loss,held-out loss\n".to_owned();
    let number = |x: f64| if x.is_nan() { String::new() } else { format!("{x:.6e}") };
    for Curve { profile, layer, rows } in curves {
        for r in *rows {
            let (rate, train, held_out) = (number(r.learning_rate), number(r.train), number(r.held_out));
            writeln!(out, "{profile},{layer},{},{rate},{train},{held_out}", r.step).expect("writing to a string");
        }
    }
    out
}

const WIDTH: u32 = 960;
const PANEL: u32 = 420;
/// Right of a panel.
const LEGEND: u32 = 120;
/// Layers that the legend of a panel names, at most.
const NAMED: usize = 12;

/// Held-out losses over steps, a panel for each profile and a line for each layer, losses on a logarithmic scale; as SVG.
pub(super) fn drawing(curves: &[Curve<'_>], steps: u64, loss: &str) -> String {
    let mut profiles: Vec<&str> = Vec::new();
    curves.iter().filter(|c| !profiles.contains(&c.profile)).map(|c| c.profile).collect::<Vec<_>>().into_iter().for_each(|p| {
        if !profiles.contains(&p) {
            profiles.push(p);
        }
    });
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, PANEL * profiles.len().max(1) as u32)).into_drawing_area();
        // A string takes everything that is drawn.
        let drawn = root.fill(&WHITE).and_then(|()| {
            let panels = root.split_evenly((profiles.len().max(1), 1));
            profiles.iter().zip(&panels).try_for_each(|(profile, panel)| {
                let lines: Vec<&Curve<'_>> = curves.iter().filter(|c| c.profile == *profile).collect();
                self::panel(panel, &format!("{profile}: held-out {loss} loss by layer"), &lines, steps)
            })?;
            root.present()
        });
        drawn.expect("drawing into a string");
    }
    svg
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn panel(
    area: &Area<'_>,
    title: &str,
    lines: &[&Curve<'_>],
    steps: u64,
) -> Result<(), DrawingAreaErrorKind<<SVGBackend<'static> as DrawingBackend>::ErrorType>> {
    // A logarithm needs a positive number.
    let points = |c: &Curve<'_>| -> Vec<(u64, f64)> {
        c.rows.iter().filter(|r| !r.held_out.is_nan()).map(|r| (r.step, r.held_out.max(1e-9))).collect()
    };
    let all: Vec<f64> = lines.iter().flat_map(|c| points(c)).map(|p| p.1).collect();
    let (low, high) = all.iter().fold((f64::INFINITY, 0.0f64), |(a, b), &x| (a.min(x), b.max(x)));
    let (low, high) = if low <= high { (low * 0.9, high * 1.1) } else { (0.1, 1.0) };
    // A power of ten is in sight: the scale's labels begin at one.
    let low = low.min(0.95 * 10f64.powf(high.log10().floor()));
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .margin_right(LEGEND)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d(0..steps.max(1), (low..high).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc("steps")
        .y_desc("loss; 1 keeps nothing (log scale)")
        .y_label_formatter(&|y| format!("{y:.3}"))
        .axis_desc_style(("sans-serif", 15))
        .label_style(("sans-serif", 13))
        .draw()?;
    let every = lines.len().div_ceil(NAMED).max(1);
    for (i, line) in lines.iter().enumerate() {
        // From blue for the first layer over green to red for the last.
        let colour = HSLColor(0.66 * (1.0 - i as f64 / (lines.len().max(2) - 1) as f64), 0.85, 0.42);
        chart.draw_series(LineSeries::new(points(line), colour.stroke_width(2)))?;
        if i % every == 0 {
            let (x, y) = (WIDTH as i32 - LEGEND as i32 + 16, 44 + 20 * (i / every) as i32);
            area.draw(&PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)))?;
            area.draw(&Text::new(format!("layer {}", line.layer), (x + 24, y - 6), ("sans-serif", 13)))?;
        }
    }
    Ok(())
}

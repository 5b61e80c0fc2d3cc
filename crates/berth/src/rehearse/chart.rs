//! The picture: throughput, latency, waiting and memory over the number of VMs.

use plotters::coord::ranged1d::ValueFormatter;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::knee::Judgement;
use super::measure::Step;

const SIZE: (u32, u32) = (1100, 760);
const BLUE_LINE: RGBColor = RGBColor(31, 119, 180);
const ORANGE_LINE: RGBColor = RGBColor(214, 110, 20);
const GREEN_LINE: RGBColor = RGBColor(44, 130, 44);
const KNEE: RGBColor = RGBColor(170, 120, 0);
const BAD: RGBColor = RGBColor(180, 30, 30);

/// One line of a panel: its name, colour, and value at a step.
type Line<'a> = (&'a str, RGBColor, &'a dyn Fn(&Step) -> Option<f64>);

/// The picture as an SVG file.
///
/// # Errors
/// A text when it cannot be drawn.
pub fn draw(steps: &[Step], judgement: &Judgement) -> Result<String, String> {
    let mut text = String::new();
    panels(&mut text, steps, judgement).map_err(|e| e.to_string())?;
    Ok(text)
}

type Failure = Box<dyn std::error::Error>;

fn panels(text: &mut String, steps: &[Step], judgement: &Judgement) -> Result<(), Failure> {
    const GIB: f64 = (1u64 << 30) as f64;
    let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
    root.fill(&WHITE).map_err(|e| e.to_string())?;
    let areas = root.split_evenly((2, 2));
    let panels: [(&str, bool, &[Line]); 4] = [
        (
            "throughput, units a second",
            false,
            &[
                ("all VMs", BLUE_LINE, &|s| Some(s.total_per_second)),
                ("each VM", ORANGE_LINE, &|s| Some(s.vm_per_second)),
            ],
        ),
        (
            "latency of a small request, ms",
            true,
            &[
                ("p50", BLUE_LINE, &|s| Some(s.latency_p50_seconds * 1000.0)),
                ("p99", ORANGE_LINE, &|s| Some(s.latency_p99_seconds * 1000.0)),
            ],
        ),
        (
            "waiting, percent of the time",
            false,
            &[
                ("steal", BLUE_LINE, &|s| s.steal_percent),
                ("PSI CPU", ORANGE_LINE, &|s| s.pressure_cpu_percent),
                ("PSI memory", GREEN_LINE, &|s| s.pressure_memory_percent),
            ],
        ),
        (
            "memory, GiB",
            false,
            &[
                ("resident", BLUE_LINE, &|s| Some(s.resident_bytes as f64 / GIB)),
                ("stored", ORANGE_LINE, &|s| Some(s.stored_bytes as f64 / GIB)),
            ],
        ),
    ];
    for (area, (title, logarithmic, lines)) in areas.iter().zip(panels) {
        panel(area, title, logarithmic, lines, (steps, judgement))?;
    }
    root.present().map_err(|e| e.to_string())?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn panel<'a>(
    area: &Area<'a>,
    title: &str,
    logarithmic: bool,
    lines: &[Line<'_>],
    (steps, judgement): (&[Step], &Judgement),
) -> Result<(), Failure> {
    let values = || lines.iter().flat_map(|line| steps.iter().filter_map(line.2)).filter(|v| v.is_finite());
    let most = values().fold(0.0, f64::max);
    let last = steps.last().map_or(1, |step| step.vms);
    let first = steps.first().map_or(1, |step| step.vms);
    // A range of no length cannot be drawn.
    let x = f64::from(first)..f64::from(last).max(f64::from(first) + 1.0);
    let mut builder = ChartBuilder::on(area);
    builder.caption(title, ("sans-serif", 17)).margin(12).x_label_area_size(38).y_label_area_size(58);
    if logarithmic {
        let least = values().filter(|v| *v > 0.0).fold(f64::INFINITY, f64::min);
        let (least, most) = if least.is_finite() { (least / 2.0, most * 2.0) } else { (0.1, 1.0) };
        let y = least..most.max(least * 10.0);
        let top = y.end;
        let mut chart = builder.build_cartesian_2d(x, y.log_scale())?;
        fill(&mut chart, lines, (steps, judgement), (least, top))
    } else {
        let top = if most > 0.0 { most * 1.1 } else { 1.0 };
        let mut chart = builder.build_cartesian_2d(x, 0.0..top)?;
        fill(&mut chart, lines, (steps, judgement), (0.0, top))
    }
}

type Chart<'a, Y> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<RangedCoordf64, Y>>;

fn fill<'a, Y>(
    chart: &mut Chart<'a, Y>,
    lines: &[Line<'_>],
    (steps, judgement): (&[Step], &Judgement),
    (bottom, top): (f64, f64),
) -> Result<(), Failure>
where
    Y: Ranged<ValueType = f64> + ValueFormatter<f64> + 'a,
{
    let mesh = &mut chart.configure_mesh();
    mesh.x_desc("VMs").light_line_style(WHITE).bold_line_style(RGBColor(225, 225, 225));
    mesh.x_label_formatter(&|x| format!("{x:.0}")).y_label_formatter(&|y| number(*y));
    let vms = |at: Option<&Step>| at.map_or(1, |step| step.vms);
    // No more labels than whole numbers.
    let labels = vms(steps.last()).saturating_sub(vms(steps.first())).saturating_add(1);
    mesh.x_labels(labels.clamp(2, 9).into()).y_labels(7).draw()?;
    for &(name, colour, value) in lines {
        let points = || steps.iter().filter_map(|s| Some((f64::from(s.vms), value(s)?.max(bottom))));
        if points().next().is_none() {
            continue;
        }
        chart
            .draw_series(LineSeries::new(points(), colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        chart.draw_series(points().map(|point| Circle::new(point, 3, colour.filled())))?;
    }
    let bad = judgement.bad.as_ref().and_then(|_| steps.get(judgement.good.map_or(0, |i| i + 1)));
    let knee = judgement.knee.and_then(|i| steps.get(i));
    for (step, name, colour) in [(knee, "knee", KNEE), (bad, "too many", BAD)] {
        let Some(step) = step else { continue };
        let x = f64::from(step.vms);
        let line = PathElement::new([(x, bottom), (x, top)], colour.stroke_width(2));
        chart
            .draw_series(std::iter::once(line))?
            .label(format!("{name}: {} VM{}", step.vms, if step.vms == 1 { "" } else { "s" }))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::MiddleRight)
        .background_style(WHITE.mix(0.85))
        .border_style(RGBColor(200, 200, 200))
        .label_font(("sans-serif", 13))
        .draw()?;
    Ok(())
}

/// A number at an axis.
fn number(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        v if v >= 10.0 => format!("{v:.0}"),
        v if v >= 1.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::knee::{judge, tests::step};
    use super::*;

    #[test]
    fn the_knee_and_what_is_too_many_are_marked() {
        let steps = [step(1, 50.0, 0.001), step(2, 99.0, 0.002), step(4, 100.0, 0.3)];
        let svg = draw(&steps, &judge(&steps, 0.1)).unwrap();
        for text in ["knee: 2 VMs", "too many: 4 VMs", "latency of a small request, ms", "PSI CPU"] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(!svg.contains("NaN") && !svg.contains("PSI memory"), "nothing is drawn of what is not known");
    }

    #[test]
    fn any_steps_can_be_drawn() {
        let mut nothing = step(1, 0.0, 0.0);
        nothing.resident_bytes = 0;
        nothing.steal_percent = None;
        for steps in [vec![], vec![nothing.clone()], vec![nothing, step(2, 1e12, 60.0)]] {
            let svg = draw(&steps, &judge(&steps, 0.1)).unwrap();
            assert!(svg.starts_with("<svg") && !svg.contains("NaN") && !svg.contains("inf"));
        }
    }
}

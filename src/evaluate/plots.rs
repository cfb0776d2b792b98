//! The report's pictures, as SVG text.

use std::fmt::Write;

use plotters::prelude::*;

use super::html::escape;
use super::{ClassFigures, Evaluation, SliceFigures};
use crate::bundle::Group;

const INK: RGBColor = RGBColor(60, 60, 67);
const RULE: RGBColor = RGBColor(222, 222, 226);
const BEFORE: RGBColor = RGBColor(214, 118, 72);
const AFTER: RGBColor = RGBColor(38, 110, 168);
const UNKNOWN: RGBColor = RGBColor(120, 120, 128);
const FONT: &str = "sans-serif";
/// Classes up to which each gets its name under a plot.
const NAMED_CLASSES: usize = 80;
/// Characters of such a name.
const NAME: usize = 24;
/// Pixels of a class with a name, and of one without; of one of [`CROWD`] or more, where a page would grow too wide.
const NAMED_WIDTH: u32 = 12;
const WIDTH: u32 = 4;
const CROWDED_WIDTH: u32 = 1;
const CROWD: usize = 2000;
/// Images below which a bin's accuracy is mostly chance.
const FEW_IMAGES: u64 = 10;
/// Set sizes shown one by one; larger ones are summed in the last bar.
const SIZES: usize = 20;

type Plot = Result<String, DrawingAreaErrorKind<std::io::Error>>;

fn color(group: Option<Group>) -> RGBColor {
    match group {
        Some(Group::Many) => RGBColor(38, 110, 168),
        Some(Group::Medium) => RGBColor(86, 153, 98),
        Some(Group::Few) => RGBColor(190, 82, 120),
        None => UNKNOWN,
    }
}

/// Accuracy by score of the best class, before (softmax) and after (calibrated) for one slice; 320×320.
pub(super) fn reliability(title: &str, before: &SliceFigures, after: Option<&SliceFigures>) -> Plot {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (320, 320)).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .caption(title, (FONT, 15).into_font().color(&INK))
            .margin(8)
            .margin_right(14)
            .x_label_area_size(38)
            .y_label_area_size(44)
            .build_cartesian_2d(0.0..1.0, 0.0..1.0)?;
        chart
            .configure_mesh()
            .x_labels(6)
            .y_labels(6)
            .light_line_style(TRANSPARENT)
            .bold_line_style(RULE)
            .axis_style(INK)
            .label_style((FONT, 11).into_font().color(&INK))
            .axis_desc_style((FONT, 12).into_font().color(&INK))
            .x_desc("score of the best class")
            .y_desc("accuracy")
            .draw()?;
        chart.draw_series(LineSeries::new([(0.0, 0.0), (1.0, 1.0)], INK.mix(0.5)))?;
        for (slice, color) in [(Some(before), BEFORE), (after, AFTER)] {
            let Some(slice) = slice else { continue };
            let points = slice.reliability.iter().filter(|b| b.images >= FEW_IMAGES);
            let points = points.map(|b| (b.confidence, b.accuracy));
            chart.draw_series(LineSeries::new(points, color.stroke_width(2)))?;
            // The circle's area follows the share of images in the bin.
            chart.draw_series(slice.reliability.iter().map(|b| {
                let radius = (2.0 + 12.0 * b.share.sqrt()).round() as i32;
                let strength = if b.images < FEW_IMAGES { 0.15 } else { 0.45 };
                Circle::new((b.confidence, b.accuracy), radius, color.mix(strength).filled())
            }))?;
        }
        area.present()?;
    }
    Ok(svg)
}

/// One bar per class, ordered by training images: what `value` says of it, and its figures when a pointer rests on it.
pub(super) fn by_class(
    evaluation: &Evaluation,
    description: &str,
    value: &dyn Fn(&ClassFigures) -> Option<f64>,
    goal: Option<f64>,
) -> Plot {
    let mut classes: Vec<&ClassFigures> = evaluation.classes.iter().filter(|c| c.images > 0).collect();
    classes.sort_by_key(|c| std::cmp::Reverse(c.training_images.unwrap_or(0)));
    let named = classes.len() <= NAMED_CLASSES;
    let each = match classes.len() {
        _ if named => NAMED_WIDTH,
        CROWD.. => CROWDED_WIDTH,
        _ => WIDTH,
    };
    let width = (64 + each * classes.len() as u32).max(980);
    let names: Vec<String> = classes.iter().map(|c| shortened(&c.label)).collect();
    // An axis of one place has no width.
    let places = classes.len().max(2) as u32;
    let (mut svg, mut over) = (String::new(), String::new());
    {
        let longest = names.iter().map(|name| name.chars().count()).max().unwrap_or(0) as u32;
        // A name that is too wide for its bar is turned.
        let turned = named && longest * 7 > 900 / classes.len().max(1) as u32;
        let below = match (named, turned) {
            (true, true) => 12 + 7 * longest,
            (true, false) => 24,
            (false, _) => 8,
        };
        let area = SVGBackend::with_string(&mut svg, (width, 260 + below)).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .x_label_area_size(below)
            .y_label_area_size(48)
            .build_cartesian_2d((0..places - 1).into_segmented(), 0.0..1.0)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(RULE)
            .axis_style(INK)
            .disable_x_axis()
            .y_label_style((FONT, 11).into_font().color(&INK))
            .axis_desc_style((FONT, 12).into_font().color(&INK))
            .y_desc(description)
            .draw()?;
        let bars = classes.iter().enumerate().filter_map(|(n, class)| {
            let height = value(class).filter(|v| v.is_finite())?;
            let n = n as u32;
            let mut bar = Rectangle::new(
                [(SegmentValue::Exact(n), 0.0), (SegmentValue::Exact(n + 1), height)],
                color(class.group).mix(0.85).filled(),
            );
            let gap = u32::from(each > CROWDED_WIDTH);
            bar.set_margin(0, 0, gap, gap);
            Some(bar)
        });
        chart.draw_series(bars)?;
        if let Some(goal) = goal {
            let ends = [(SegmentValue::Exact(0), goal), (SegmentValue::Exact(classes.len() as u32), goal)];
            chart.draw_series(LineSeries::new(ends, INK.stroke_width(1)))?;
        }
        let plot = chart.plotting_area();
        let (_, height) = plot.get_pixel_range();
        for ((n, class), name) in (0..).zip(&classes).zip(&names) {
            let edge = |n| plot.map_coordinate(&(SegmentValue::Exact(n), 0.0)).0;
            if named {
                // Plotters turns a text about its middle, which would lay it over the bars.
                let (x, y) = ((edge(n) + edge(n + 1)) / 2, height.end + if turned { 8 } else { 18 });
                let turn = if turned {
                    format!("transform=\"rotate(90 {x} {y})\" dominant-baseline=\"middle\"")
                } else {
                    "text-anchor=\"middle\"".into()
                };
                let name = escape(name);
                let _ = write!(
                    over,
                    "<text x=\"{x}\" y=\"{y}\" {turn} font-family=\"{FONT}\" font-size=\"11\" fill=\"#3C3C43\">{name}</text>"
                );
            }
            let Some(value) = value(class).filter(|v| v.is_finite()) else { continue };
            let trained = class.training_images.map(|n| format!(", {n} for training")).unwrap_or_default();
            // Writing to a String cannot fail.
            let _ = write!(
                over,
                "<rect class=\"tip\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"><title>{}: {description} {:.1} %, {} \
                 images{trained}</title></rect>",
                edge(n),
                height.start,
                edge(n + 1) - edge(n),
                height.end - height.start,
                escape(&class.label),
                100.0 * value,
                class.images
            );
        }
        area.present()?;
    }
    let end = svg.rfind("</svg>").unwrap_or(svg.len());
    svg.insert_str(end, &over);
    Ok(svg)
}

/// A label that fits under a plot.
fn shortened(label: &str) -> String {
    match label.char_indices().nth(NAME) {
        Some((end, _)) => format!("{}…", label[..end].trim_end()),
        None => label.to_owned(),
    }
}

/// Images by set size.
pub(super) fn set_sizes(counts: &[u64], title: &str) -> Plot {
    let mut bars: Vec<u64> = counts.iter().take(SIZES).copied().collect();
    let beyond: u64 = counts.iter().skip(SIZES).sum();
    if beyond > 0 {
        bars.push(beyond);
    }
    // An axis of one place has no width.
    bars.resize(bars.len().max(2), 0);
    let total: u64 = counts.iter().sum::<u64>().max(1);
    let share = |n: u64| n as f64 / total as f64;
    let highest = bars.iter().copied().max().map_or(1.0, share) * 1.08;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (480, 280)).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .caption(title, (FONT, 15).into_font().color(&INK))
            .margin(8)
            .x_label_area_size(38)
            .y_label_area_size(48)
            .build_cartesian_2d((0..bars.len() as u32 - 1).into_segmented(), 0.0..highest)?;
        let name = |position: &SegmentValue<u32>| match position {
            SegmentValue::CenterOf(n) if *n as usize == SIZES => format!(">{SIZES}"),
            SegmentValue::CenterOf(n) => (n + 1).to_string(),
            _ => String::new(),
        };
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(RULE)
            .axis_style(INK)
            .x_labels(bars.len())
            .x_label_formatter(&name)
            .label_style((FONT, 11).into_font().color(&INK))
            .axis_desc_style((FONT, 12).into_font().color(&INK))
            .x_desc("classes in the set")
            .y_desc("share of images")
            .draw()?;
        chart.draw_series(bars.iter().enumerate().map(|(n, count)| {
            let n = n as u32;
            let mut bar = Rectangle::new(
                [(SegmentValue::Exact(n), 0.0), (SegmentValue::Exact(n + 1), share(*count))],
                AFTER.mix(0.85).filled(),
            );
            bar.set_margin(0, 0, 2, 2);
            bar
        }))?;
        area.present()?;
    }
    Ok(svg)
}

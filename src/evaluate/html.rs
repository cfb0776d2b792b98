//! report.html: one page with its pictures inside, readable without a network.

use std::fmt::Write;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use super::{Comparison, Evaluation, Figure, PriorFigures, ScorerFigures, plots};

/// Why the page could not be drawn.
#[derive(Debug, thiserror::Error)]
#[error("a plot of the report cannot be drawn: {0}")]
pub struct DrawError(String);

/// Rows of the tables: metric, heading, factor, decimals.
const ROWS: [(&str, &str, f64, usize); 11] = [
    ("top1", "top-1, %", 100.0, 2),
    ("top5", "top-5, %", 100.0, 2),
    ("nll", "NLL", 1.0, 4),
    ("brier", "Brier", 1.0, 4),
    ("ece", "ECE, %", 100.0, 2),
    ("ece_equal_mass", "ECE, equal mass, %", 100.0, 2),
    ("classwise_ece", "classwise ECE, %", 100.0, 3),
    ("pas_coverage", "coverage, adjusted sets, %", 100.0, 2),
    ("pas_size", "size, adjusted sets", 1.0, 3),
    ("plain_coverage", "coverage, plain sets, %", 100.0, 2),
    ("plain_size", "size, plain sets", 1.0, 3),
];

const DOCTYPE: &str = "<!doctype html>\n";

const STYLE: &str = "
body{font:15px/1.5 system-ui,sans-serif;color:#222226;background:#fff;max-width:1040px;margin:32px auto;padding:0 20px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:19px;margin:40px 0 8px}p{max-width:76ch}small,.note{color:#606068}
table{border-collapse:collapse;margin:12px 0;min-width:560px;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:4px 8px;text-align:right;border-bottom:1px solid #e4e4e8}td{white-space:nowrap}
th:first-child,td:first-child{text-align:left}thead th{border-bottom:2px solid #88888f;vertical-align:bottom}
td small{display:block;font-size:11.5px}.plots{display:flex;flex-wrap:wrap;gap:4px}.scroll{overflow-x:auto}
svg{max-width:100%;height:auto}.key i{display:inline-block;width:11px;height:11px;border-radius:2px;margin:0 5px 0 14px}
code{font-size:13px}";

/// What every page's head has, and by which it is known.
const GENERATOR: &str = "<meta name=\"generator\" content=\"fold evaluate\">";
/// By what pages of version 0.1 are known, which have no [`GENERATOR`].
const FIRST_STYLE: &str = "content=\"width=device-width\"><style>\nbody{font:15px/1.5 system-ui,sans-serif;\
                           color:#222226;background:#fff;max-width:1040px;margin:32px auto;padding:0 20px}";
/// Bytes of a page in which its mark is looked for. The title before it has a few hundred.
const HEAD: u64 = 1 << 14;

/// Whether a page that [`page`] made, in this version or an earlier one, lies at `path`.
pub fn is_page(path: &Path) -> bool {
    if !fs::metadata(path).is_ok_and(|found| found.is_file()) {
        return false;
    }
    let mut head = Vec::new();
    let read = File::open(path).and_then(|file| file.take(HEAD).read_to_end(&mut head));
    let head = String::from_utf8_lossy(&head);
    read.is_ok() && head.starts_with(DOCTYPE) && [GENERATOR, FIRST_STYLE].iter().any(|mark| head.contains(mark))
}

/// The page of `evaluation`, and of a comparison when there is one.
///
/// # Errors
/// When a picture cannot be drawn.
pub fn page(evaluation: &Evaluation, comparison: Option<&Comparison>) -> Result<String, DrawError> {
    let mut out = String::new();
    let title = format!("{} on {}", escape(&evaluation.bundle), escape(&evaluation.data));
    // Writing to a String cannot fail.
    let _ = write!(
        out,
        "{DOCTYPE}<html lang=\"en\"><head><meta charset=\"utf-8\">{GENERATOR}<title>{title}</title>\n\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head><body>\n\
         <h1>{title}</h1>\n<p class=\"note\">{} images · calibration {} · {} · model {}…</p>\n",
        evaluation.images,
        evaluation.calibration.as_deref().unwrap_or("none"),
        evaluation.created,
        &evaluation.model_sha256.chars().take(12).collect::<String>()
    );
    if evaluation.absent_classes > 0 {
        let _ = writeln!(
            out,
            "<p>{} classes have no images here and are left out of all figures.</p>",
            evaluation.absent_classes
        );
    }
    for prior in &evaluation.priors {
        headline(&mut out, prior);
    }
    pictures(&mut out, evaluation).map_err(|error| DrawError(error.to_string()))?;
    confusions(&mut out, evaluation);
    if let Some(comparison) = comparison {
        differences(&mut out, comparison);
    }
    for prior in &evaluation.priors {
        figures(&mut out, prior, evaluation);
    }
    out.push_str("</body></html>\n");
    Ok(out)
}

fn caption(scorer: &str) -> &'static str {
    match scorer {
        "softmax" => "softmax of the logits",
        "temperature" => "one temperature, for comparison",
        _ => "calibrated",
    }
}

/// One row per way of scoring: what it comes to overall, and classwise ECE by group.
fn headline(out: &mut String, prior: &PriorFigures) {
    let Some(first) = prior.scorers.first() else { return };
    let about = match prior.prior {
        "uniform" => "All classes count as equally frequent, in the images and in the scores.",
        _ => "Images are weighted to the class mix of training, and calibrated scores are given for that mix.",
    };
    let overall = ROWS.iter().filter(|row| !row.0.contains("equal_mass") && !row.0.contains("plain"));
    let _ = write!(
        out,
        "<h2>Under the {} prior</h2>\n<p>{about}</p>\n<div class=\"scroll\"><table><thead><tr><th></th>",
        prior.prior
    );
    for (_, heading, ..) in overall.clone() {
        let _ = write!(out, "<th>{}</th>", heading);
    }
    let groups: Vec<usize> = (0..first.slices.len()).filter(|n| *n > 1).collect();
    for &n in &groups {
        let _ = write!(out, "<th>{}: classwise ECE, %</th>", first.slices[n].slice);
    }
    out.push_str("</tr></thead><tbody>\n");
    for scorer in &prior.scorers {
        let _ = write!(out, "<tr><td>{}</td>", caption(scorer.scorer));
        let mut value = |slice: usize, metric: &str, factor: f64, decimals: usize| {
            let _ = match scorer.slices[slice].metrics.get(metric) {
                Some(figure) => write!(out, "<td>{:.decimals$}</td>", figure.value * factor),
                None => write!(out, "<td>–</td>"),
            };
        };
        for (metric, _, factor, decimals) in overall.clone() {
            value(0, metric, *factor, *decimals);
        }
        for &n in &groups {
            value(n, "classwise_ece", 100.0, 3);
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div>\n");
}

fn figures(out: &mut String, prior: &PriorFigures, evaluation: &Evaluation) {
    let _ = write!(
        out,
        "<h2>All figures under the {} prior</h2>\n<p>Small print: the 95 % interval over {} resamples of the images and, for \
         binned errors, after ≤ the most that perfect calibration would give in 95 % of draws. NLL and Brier decide; lower \
         is better.</p>\n",
        prior.prior, evaluation.resamples
    );
    for scorer in &prior.scorers {
        table(out, scorer, true);
    }
}

fn table(out: &mut String, scorer: &ScorerFigures, plain_values: bool) {
    let _ = write!(out, "<div class=\"scroll\"><table><thead><tr><th>{}</th>", caption(scorer.scorer));
    for slice in &scorer.slices {
        let _ = write!(out, "<th>{}</th>", slice.slice);
    }
    out.push_str("</tr></thead><tbody>\n");
    for (metric, heading, factor, decimals) in ROWS {
        if !scorer.slices.iter().any(|s| s.metrics.contains_key(metric)) {
            continue;
        }
        let _ = write!(out, "<tr><td>{heading}</td>");
        for slice in &scorer.slices {
            let _ = match slice.metrics.get(metric) {
                Some(figure) => write!(out, "<td>{}</td>", cell(figure, factor, decimals, plain_values)),
                None => write!(out, "<td>–</td>"),
            };
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div>\n");
}

fn cell(figure: &Figure, factor: f64, decimals: usize, plain_value: bool) -> String {
    let value = figure.value * factor;
    let mut text = if plain_value { format!("{value:.decimals$}") } else { format!("{value:+.decimals$}") };
    if let Some([low, high]) = figure.interval {
        let _ = write!(text, "<small>{:.decimals$} … {:.decimals$}</small>", low * factor, high * factor);
    }
    if let Some(null) = figure.null {
        let _ = write!(text, "<small>≤ {:.decimals$}</small>", null * factor);
    }
    text
}

fn pictures(
    out: &mut String,
    evaluation: &Evaluation,
) -> Result<(), plotters::drawing::DrawingAreaErrorKind<std::io::Error>> {
    let Some(uniform) = evaluation.priors.first() else { return Ok(()) };
    let find = |name: &str| uniform.scorers.iter().find(|s| s.scorer == name);
    let (Some(before), after) = (find("softmax"), find("calibrated")) else { return Ok(()) };
    out.push_str(
        "<h2>Reliability</h2>\n<p>Of the images whose best class scores about x, the share that is right. On the \
         line, scores are probabilities. Groups are by true class, so for them the line is not an exact target. \
         Circles grow with the share of images.</p>\n<p class=\"key\"><i style=\"background:#d67648\"></i>softmax",
    );
    if after.is_some() {
        out.push_str("<i style=\"background:#266ea8\"></i>calibrated");
    }
    out.push_str("</p>\n<div class=\"plots\">\n");
    for (n, slice) in before.slices.iter().enumerate().filter(|(_, s)| s.slice != "macro") {
        out.push_str(&plots::reliability(slice.slice, slice, after.map(|a| &a.slices[n]))?);
    }
    out.push_str("</div>\n<h2>Accuracy per class</h2>\n");
    let key = "<p class=\"key\">Training images: <i style=\"background:#266ea8\"></i>many, over 100 <i \
               style=\"background:#569962\"></i>medium, 20 to 100 <i style=\"background:#be5278\"></i>few, under 20</p>\n";
    out.push_str(key);
    let scorer = if after.is_some() { "calibrated" } else { "softmax" };
    let recall = plots::by_class(evaluation, "accuracy", &|c| c.recall.get(scorer).copied(), None)?;
    let _ = writeln!(out, "<div>{recall}</div>");
    if evaluation.set_sizes.is_empty() {
        return Ok(());
    }
    let _ = write!(
        out,
        "<h2>Prediction sets, α = {}</h2>\n<p>Share of each class's images whose set contains the class; the line is the \
         target of {:.0} %, which is promised on average over the stated class mix, not for every class.</p>\n{key}<h3>Adjusted by \
         prevalence</h3>\n",
        evaluation.alpha,
        100.0 * (1.0 - evaluation.alpha)
    );
    let goal = Some(1.0 - evaluation.alpha);
    out.push_str(&plots::by_class(evaluation, "coverage", &|c| c.coverage.get("pas").copied(), goal)?);
    out.push_str("\n<h3>Plain</h3>\n");
    out.push_str(&plots::by_class(evaluation, "coverage", &|c| c.coverage.get("plain").copied(), goal)?);
    out.push_str("\n<h3>Set sizes</h3>\n<div class=\"plots\">\n");
    for (method, title) in [("pas", "adjusted by prevalence"), ("plain", "plain")] {
        if let Some(counts) = evaluation.set_sizes.get(method) {
            out.push_str(&plots::set_sizes(counts, title)?);
        }
    }
    out.push_str("</div>\n");
    Ok(())
}

fn confusions(out: &mut String, evaluation: &Evaluation) {
    if evaluation.confusions.is_empty() {
        return;
    }
    let _ = write!(
        out,
        "<h2>Confusions</h2>\n<p>The {} pairs with the largest share of the true class's images.</p>\n<div \
         class=\"scroll\"><table><thead><tr><th>true class</th><th>taken for</th><th>images</th><th>share, \
         %</th></tr></thead><tbody>\n",
        evaluation.confusions.len()
    );
    for pair in &evaluation.confusions {
        let _ = writeln!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{:.1}</td></tr>",
            escape(&pair.label),
            escape(&pair.taken_for),
            pair.images,
            100.0 * pair.share
        );
    }
    out.push_str("</tbody></table></div>\n");
}

fn differences(out: &mut String, comparison: &Comparison) {
    let _ = write!(
        out,
        "<h2>{} minus {}</h2>\n<p>On the same images; intervals are over the same resamples for both. An interval \
         that does not contain 0 indicates a difference.</p>\n",
        escape(&comparison.bundle),
        escape(&comparison.against)
    );
    for prior in &comparison.differences {
        let _ = writeln!(out, "<h3>Under the {} prior</h3>", prior.prior);
        for scorer in &prior.scorers {
            table(out, scorer, false);
        }
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

//! report.html: one page with its pictures inside, readable without a network.

use std::fmt::Write;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use super::{Comparison, Evaluation, FamiliarityFigures, Figure, PriorFigures, ScorerFigures, plots, table};

/// Why the page could not be drawn.
#[derive(Debug, thiserror::Error)]
#[error("a plot of the report cannot be drawn: {0}")]
pub struct DrawError(String);

/// Rows of the tables: metric, heading, factor, decimals.
const ROWS: [(&str, &str, f64, usize); 16] = [
    ("top1", "top-1, %", 100.0, 2),
    ("top5", "top-5, %", 100.0, 2),
    ("nll", "NLL", 1.0, 4),
    ("brier", "Brier", 1.0, 4),
    ("ece", "ECE, %", 100.0, 2),
    ("ece_equal_mass", "ECE, equal mass, %", 100.0, 2),
    ("classwise_ece", "classwise ECE, %", 100.0, 3),
    ("posterior_coverage", "coverage, sets by score, %", 100.0, 2),
    ("posterior_size", "size, sets by score", 1.0, 3),
    ("posterior_gap", "under-coverage gap, sets by score, %", 100.0, 2),
    ("pas_coverage", "coverage, adjusted sets, %", 100.0, 2),
    ("pas_size", "size, adjusted sets", 1.0, 3),
    ("pas_gap", "under-coverage gap, adjusted sets, %", 100.0, 2),
    ("plain_coverage", "coverage, plain sets, %", 100.0, 2),
    ("plain_size", "size, plain sets", 1.0, 3),
    ("plain_gap", "under-coverage gap, plain sets, %", 100.0, 2),
];

const DOCTYPE: &str = "<!doctype html>\n";

/// The plots' own colours are those of the light style; [`plots`] writes them as attributes, which rules outrank.
const STYLE: &str = "
:root{color-scheme:light dark;--page:#fff;--ink:#222226;--soft:#606068;--line:#e4e4e8;--rule:#88888f;--mesh:#dedee2;--axis:#3c3c43;
--before:#d67648;--after:#266ea8;--medium:#569962;--few:#be5278;--none:#787880;--tint:#266ea82e}
@media(prefers-color-scheme:dark){:root{--page:#17171b;--ink:#e6e6ea;--soft:#a6a6b0;--line:#303038;--rule:#77777f;--mesh:#36363e;
--axis:#c6c6ce;--before:#e58f63;--after:#62a8e0;--medium:#74ba80;--few:#e07fa3;--none:#9c9ca6;--tint:#62a8e03d}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:1180px;margin:32px auto;padding:0 20px}
h1{font-size:26px;margin:0 0 4px;overflow-wrap:anywhere}h2{font-size:19px;margin:40px 0 8px}p{max-width:76ch}
small,.note{color:var(--soft)}
table{border-collapse:separate;border-spacing:0;margin:12px 0;min-width:560px;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:4px 8px;text-align:right;border-bottom:1px solid var(--line)}td{white-space:nowrap}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--page)}
td:first-child{max-width:16em;white-space:normal;overflow-wrap:anywhere}
thead th{border-bottom:2px solid var(--rule);vertical-align:bottom}td small{display:block;font-size:11.5px}
.plots{display:flex;flex-wrap:wrap;gap:4px}.scroll{overflow-x:auto}.tall{max-height:75vh;overflow:auto;border-bottom:1px solid var(--line)}
.tall thead th{position:sticky;top:0;background:var(--page)}.tall thead th:first-child{z-index:1}.tall table{margin-top:0}
th button{all:unset;cursor:pointer;text-decoration:underline dotted var(--soft)}th button:focus-visible{outline:2px solid var(--after)}
th[aria-sort=ascending] button::after{content:' \\2191'}th[aria-sort=descending] button::after{content:' \\2193'}
td.bar{min-width:88px;background:linear-gradient(var(--tint),var(--tint)) 0/calc(var(--v)*1%) 100% no-repeat}
.plots svg{max-width:100%;height:auto}.scroll svg{display:block}
i{display:inline-block;width:11px;height:11px;border-radius:2px;margin:0 5px 0 0;background:var(--none)}.key i{margin-left:14px}.key span{white-space:nowrap}
i.before{background:var(--before)}i.after,i.many{background:var(--after)}i.medium{background:var(--medium)}i.few{background:var(--few)}
.tip{fill:transparent}.tip:hover{fill:var(--tint)}code{font-size:13px}
[fill='#3C3C43']{fill:var(--axis)}[stroke='#3C3C43']{stroke:var(--axis)}[stroke='#DEDEE2']{stroke:var(--mesh)}
[fill='#D67648']{fill:var(--before)}[stroke='#D67648']{stroke:var(--before)}[fill='#266EA8']{fill:var(--after)}
[stroke='#266EA8']{stroke:var(--after)}[fill='#569962']{fill:var(--medium)}[fill='#BE5278']{fill:var(--few)}
[fill='#787880']{fill:var(--none)}
@media(max-width:600px){body{margin:16px auto;padding:0 12px}h1{font-size:21px}td:first-child{max-width:8em}table{min-width:0}}";

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
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><style>{STYLE}</style></head><body>\n\
         <h1>{title}</h1>\n<p class=\"note\">{} images · calibration {}{} · {} · model {}…</p>\n",
        evaluation.images,
        evaluation.calibration.as_deref().unwrap_or("none"),
        evaluation.rung.map(|rung| format!(" ({rung})")).unwrap_or_default(),
        evaluation.created,
        &evaluation.model_sha256.chars().take(12).collect::<String>()
    );
    if evaluation.left_out > 0 {
        let _ = writeln!(out, "<p>{} more images were trained on, and are left out.</p>", evaluation.left_out);
    }
    if let Some(absent) = evaluation.absent() {
        let _ = writeln!(out, "<p>{}.</p>", escape(&absent));
    }
    for prior in &evaluation.priors {
        headline(&mut out, prior);
    }
    pictures(&mut out, evaluation).map_err(|error| DrawError(error.to_string()))?;
    if let Some(figures) = &evaluation.familiarity {
        familiarity(&mut out, figures);
    }
    confusions(&mut out, evaluation);
    if let Some(comparison) = comparison {
        differences(&mut out, comparison);
    }
    for prior in &evaluation.priors {
        figures(&mut out, prior, evaluation);
    }
    let _ = writeln!(out, "<script>{}</script></body></html>", table::SORT);
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
    let has = |metric: &str| prior.scorers.iter().any(|s| s.slices.iter().any(|s| s.metrics.contains_key(metric)));
    let sets = if has("posterior_size") { "posterior" } else { "pas" };
    let is_set = |metric: &str| ["_coverage", "_size", "_gap"].iter().any(|end| metric.ends_with(end));
    let overall =
        ROWS.iter().filter(|row| !row.0.contains("equal_mass") && (!is_set(row.0) || row.0.starts_with(sets)));
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
         binned errors, after ≤ the most that perfect calibration would give in 95 % of draws. Binned errors grow when images \
         are drawn twice, so that their intervals may lie above the figures. NLL and Brier decide; lower is better.</p>\n",
        prior.prior, evaluation.resamples
    );
    for scorer in &prior.scorers {
        metrics(out, scorer, true);
    }
}

fn metrics(out: &mut String, scorer: &ScorerFigures, plain_values: bool) {
    let _ = write!(out, "<div class=\"scroll\"><table><thead><tr><th>{}</th>", caption(scorer.scorer));
    for slice in &scorer.slices {
        let _ = write!(out, "<th>{}</th>", slice.slice);
    }
    out.push_str("</tr></thead><tbody>\n");
    for (metric, heading, factor, decimals) in ROWS {
        let figures = || scorer.slices.iter().filter_map(|s| s.metrics.get(metric));
        // Of a difference: a row of zeros says nothing.
        if figures().next().is_none() || (!plain_values && figures().all(Figure::is_zero)) {
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
         Circles grow with the share of images; those of fewer than 10 images are pale and not joined.</p>\n<p class=\"key\"><i class=\"before\"></i>softmax",
    );
    if after.is_some() {
        out.push_str("<i class=\"after\"></i>calibrated");
    }
    out.push_str("</p>\n<div class=\"plots\">\n");
    for (n, slice) in before.slices.iter().enumerate().filter(|(_, s)| s.slice != "macro") {
        out.push_str(&plots::reliability(slice.slice, slice, after.map(|a| &a.slices[n]))?);
    }
    out.push_str("</div>\n<h2>Accuracy per class</h2>\n");
    let key = "<p class=\"key\">Training images, the most first: <span><i class=\"many\"></i>many, over 100</span> \
               <span><i class=\"medium\"></i>medium, 20 to 100</span> <span><i class=\"few\"></i>few, under 20</span></p>\n";
    out.push_str(key);
    let scorer = if after.is_some() { "calibrated" } else { "softmax" };
    let recall = plots::by_class(evaluation, "accuracy", &|c| c.recall.get(scorer).copied(), None)?;
    let _ = writeln!(out, "<div class=\"scroll\">{recall}</div>");
    table::classes(out, evaluation);
    if evaluation.set_sizes.is_empty() {
        return Ok(());
    }
    let _ = write!(
        out,
        "<h2>Prediction sets, α = {}</h2>\n<p>Share of each class's images whose set contains the class; the line is the \
         target of {:.0} %, which is promised on average over the stated class mix, not for every class. The under-coverage \
         gap, in the tables, is what classes lack of the target, on average; no class makes up for another.</p>\n{key}",
        evaluation.alpha,
        100.0 * (1.0 - evaluation.alpha)
    );
    let goal = Some(1.0 - evaluation.alpha);
    let headings = [("posterior", "By score"), ("pas", "Adjusted by prevalence"), ("plain", "Plain")];
    for (method, heading) in headings.into_iter().filter(|(method, _)| evaluation.set_sizes.contains_key(method)) {
        let coverage = plots::by_class(evaluation, "coverage", &|c| c.coverage.get(method).copied(), goal)?;
        let _ = writeln!(out, "<h3>{heading}</h3>\n<div class=\"scroll\">{coverage}</div>");
    }
    out.push_str("<h3>Set sizes</h3>\n<div class=\"plots\">\n");
    for (method, title) in [("posterior", "by score"), ("pas", "adjusted by prevalence"), ("plain", "plain")] {
        if let Some(counts) = evaluation.set_sizes.get(method) {
            out.push_str(&plots::set_sizes(counts, title)?);
        }
    }
    out.push_str("</div>\n");
    Ok(())
}

fn familiarity(out: &mut String, figures: &FamiliarityFigures) {
    let _ = write!(
        out,
        "<h2>Unlike training</h2>\n<p>With <code>unlike</code>, decisions on images that are unlike the training images are \
         withheld. Of the test images, which are like them, a share as large as <code>unlike</code> should be, in every \
         group{}.</p>\n<div class=\"scroll\"><table><thead><tr><th>withheld, %</th>",
        if figures.foreign.is_some() { "; of others, as many as possible" } else { "" }
    );
    for level in &figures.levels {
        let _ = write!(out, "<th>unlike = {level}</th>");
    }
    let _ = writeln!(out, "<th>AUROC</th></tr></thead><tbody>");
    let mut row = |name: &str, shares: &[f64], auroc: Option<f64>| {
        let _ = write!(out, "<tr><td>{}</td>", escape(name));
        for share in shares {
            let _ = write!(out, "<td>{:.2}</td>", 100.0 * share);
        }
        let auroc = auroc.map_or_else(|| "–".to_owned(), |auroc| format!("{auroc:.3}"));
        let _ = writeln!(out, "<td>{auroc}</td></tr>");
    };
    for of in &figures.withheld {
        row(&format!("test images, {}", of.slice), &of.shares, None);
    }
    if let Some(foreign) = &figures.foreign {
        row(&format!("{}, {} images", foreign.data, foreign.images), &foreign.shares, Some(foreign.auroc));
    }
    out.push_str("</tbody></table></div>\n");
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
            if scorer.is_unchanged() {
                let _ = writeln!(out, "<p>{}: the same in every figure.</p>", caption(scorer.scorer));
            } else {
                metrics(out, scorer, false);
            }
        }
    }
}

pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::{ClassFigures, ReliabilityBin, SliceFigures};
    use super::*;
    use crate::bundle::Group;

    fn figure(value: f64) -> Figure {
        Figure { value, interval: Some([value; 2]), null: None }
    }

    fn scorer(scorer: &'static str, value: f64) -> ScorerFigures {
        let bin = |n: u64, images| ReliabilityBin { images, share: 0.1, confidence: n as f64 / 4.0, accuracy: 0.5 };
        let slice = SliceFigures {
            slice: "overall",
            metrics: [("top1", figure(value)), ("nll", figure(0.0))].into(),
            reliability: vec![bin(1, 100), bin(2, 3), bin(3, 100)],
        };
        ScorerFigures { scorer, slices: vec![slice], agreement: None }
    }

    fn evaluation(classes: u64) -> Evaluation {
        let class = |n: u64| ClassFigures {
            label: format!("<{n}> „ä, b“"),
            group: Some(Group::of(n)),
            training_images: Some(n),
            images: 3,
            recall: [("softmax", 0.25), ("calibrated", 0.5)].into(),
            coverage: [("pas", 0.75), ("plain", 1.0)].into(),
        };
        Evaluation {
            bundle: "mine/1".into(),
            model_sha256: "0".repeat(64),
            calibration: None,
            rung: None,
            data: "test".into(),
            images: 3 * classes as usize,
            left_out: 0,
            created: String::new(),
            alpha: 0.1,
            resamples: 20,
            absent_classes: 0,
            priors: vec![PriorFigures {
                prior: "uniform",
                scorers: vec![scorer("softmax", 0.1), scorer("calibrated", 0.2)],
            }],
            classes: (1..=classes).map(class).collect(),
            confusions: Vec::new(),
            set_sizes: [("pas", vec![1]), ("plain", vec![1, 2])].into(),
            familiarity: None,
        }
    }

    #[test]
    fn every_class_can_be_told_from_the_others_however_many_there_are() {
        for classes in [1, 2, 10, 43, 80, 81, 1000, 2500] {
            let page = page(&evaluation(classes), None).unwrap();
            let tips = page.matches("<title>&lt;").count() as u64;
            assert_eq!(tips, 3 * classes, "three plots tell of {classes} classes");
            for n in 1..=classes {
                let label = format!("&lt;{n}&gt; „ä, b“");
                let row = format!("<td title=\"{label}\">{label}</td>");
                assert_eq!(page.matches(&row).count(), 1, "{label}");
                let named = page.matches(&format!("fill=\"#3C3C43\">{label}</text>")).count();
                assert_eq!(named, if classes <= 80 { 3 } else { 0 }, "{label} of {classes}");
            }
            let first = page.find(&format!("<td title=\"&lt;{classes}&gt;")).unwrap();
            assert!(classes == 1 || first < page.find("<td title=\"&lt;1&gt;").unwrap(), "the most frequent is first");
        }
    }

    #[test]
    fn the_colours_of_the_plots_are_all_of_both_styles() {
        let page = page(&evaluation(10), None).unwrap();
        let plots = &page[page.find("<svg").unwrap()..];
        let mut colours: Vec<&str> =
            plots.split("=\"#").skip(1).filter_map(|after| after.get(..6)).filter(|c| !c.contains('"')).collect();
        colours.sort_unstable();
        colours.dedup();
        assert!(colours.len() >= 5, "{colours:?}");
        for colour in colours {
            assert!(STYLE.contains(&format!("[fill='#{colour}']")) || STYLE.contains(&format!("[stroke='#{colour}']")));
        }
        for variable in STYLE.split("var(").skip(1).map(|after| after.split(')').next().unwrap()) {
            let set = STYLE.matches(&format!("{variable}:")).count();
            assert!(
                set == 2 || variable == "--v",
                "{variable} is set {set} times: in the light style, and in the dark one"
            );
        }
    }

    #[test]
    fn a_bin_of_three_images_bends_no_line() {
        let page = page(&evaluation(10), None).unwrap();
        let lines: Vec<&str> =
            page.split("<polyline").skip(1).filter(|line| line.contains("stroke-width=\"2\"")).collect();
        assert_eq!(lines.len(), 2);
        for line in lines {
            let points = line.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
            assert_eq!(points.split_whitespace().count(), 2, "{points}");
        }
    }

    #[test]
    fn a_comparison_has_no_rows_of_zeros() {
        let differences =
            vec![PriorFigures { prior: "uniform", scorers: vec![scorer("softmax", 0.0), scorer("calibrated", 0.01)] }];
        let comparison = Comparison { bundle: "one".into(), against: "two".into(), differences };
        let page = page(&evaluation(10), Some(&comparison)).unwrap();
        let part = &page[page.find("one minus two").unwrap()..page.find("All figures").unwrap()];
        assert!(part.contains("softmax of the logits: the same in every figure."), "{part}");
        assert!(part.contains("+1.00<small>") && !part.contains("+0.0000"), "{part}");
        assert!(comparison.describe().contains("softmax     the same in every figure"), "{}", comparison.describe());
    }
}

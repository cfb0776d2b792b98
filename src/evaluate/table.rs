//! The report's table of all classes, which its reader may sort.

use std::fmt::Write;

use super::html::escape;
use super::{ClassFigures, Evaluation};

/// Sorts by the column whose heading is pressed: numbers from the largest, words from A; pressed again, the other way.
pub(super) const SORT: &str = "
for(const button of document.querySelectorAll('.classes th button'))button.onclick=()=>{
const head=button.parentElement,n=head.cellIndex,body=head.closest('table').tBodies[0],words=n<2;
const up=head.ariaSort?head.ariaSort==='descending':words,key=row=>row.cells[n].dataset.v??row.cells[n].textContent;
const order=(a,b)=>words?key(a).localeCompare(key(b),'en',{numeric:true}):(+key(a)-+key(b));
for(const other of head.parentElement.cells)other.removeAttribute('aria-sort');
head.ariaSort=up?'ascending':'descending';
body.append(...[...body.rows].sort((a,b)=>up?order(a,b):order(b,a)));};";

/// What the columns of shares say, by the key in each class's figures.
const RECALL: [(&str, &str); 2] = [("softmax", "accuracy, softmax, %"), ("calibrated", "accuracy, calibrated, %")];
const COVERAGE: [(&str, &str); 3] = [
    ("posterior", "coverage, sets by score, %"),
    ("pas", "coverage, adjusted sets, %"),
    ("plain", "coverage, plain sets, %"),
];

/// Every class that has images, the most frequent in training first.
pub(super) fn classes(out: &mut String, evaluation: &Evaluation) {
    let mut classes: Vec<&ClassFigures> = evaluation.classes.iter().filter(|class| class.images > 0).collect();
    classes.sort_by_key(|class| std::cmp::Reverse(class.training_images.unwrap_or(0)));
    let has =
        |of: fn(&ClassFigures) -> &super::figures::Shares, key: &str| classes.iter().any(|c| of(c).contains_key(key));
    let recall: Vec<_> = RECALL.into_iter().filter(|(key, _)| has(|c| &c.recall, key)).collect();
    let coverage: Vec<_> = COVERAGE.into_iter().filter(|(key, _)| has(|c| &c.coverage, key)).collect();
    out.push_str("<p>Press a heading to sort by it.</p>\n<div class=\"tall\"><table class=\"classes\"><thead><tr>");
    let headings = ["class", "group", "training images", "images here"].into_iter();
    for heading in headings.chain(recall.iter().chain(&coverage).map(|(_, heading)| *heading)) {
        let sorted = if heading == "training images" { " aria-sort=\"descending\"" } else { "" };
        // Writing to a String cannot fail.
        let _ = write!(out, "<th{sorted}><button type=\"button\">{heading}</button></th>");
    }
    out.push_str("</tr></thead><tbody>\n");
    for class in classes {
        let label = escape(&class.label);
        let group = class.group.map_or("", |group| group.name());
        let _ = write!(out, "<tr><td title=\"{label}\">{label}</td><td><i class=\"{group}\"></i>{group}</td>");
        let _ = match class.training_images {
            Some(count) => write!(out, "<td>{count}</td>"),
            None => write!(out, "<td data-v=\"-1\">–</td>"),
        };
        let _ = write!(out, "<td>{}</td>", class.images);
        for (shares, columns) in [(&class.recall, &recall), (&class.coverage, &coverage)] {
            for (key, _) in columns {
                let _ = match shares.get(key).map(|share| share * 100.0).filter(|share| share.is_finite()) {
                    Some(share) => write!(out, "<td class=\"bar\" style=\"--v:{share:.1}\">{share:.1}</td>"),
                    None => write!(out, "<td data-v=\"-1\">–</td>"),
                };
            }
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div>\n");
}

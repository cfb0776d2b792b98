//! Clients' values in errors and in the log: quoted, and cut where they are long.

use std::borrow::Cow;
use std::fmt::{self, Display, Write};

/// Bytes of a client's value that are shown.
const SHOWN: usize = 100;

/// `text` in quotes; of a long one the beginning, and how long it is.
pub(crate) fn quoted(text: &str) -> String {
    if text.len() <= SHOWN {
        return format!("{text:?}");
    }
    format!("{:?}… (cut: it has {} bytes)", &text[..text.floor_char_boundary(SHOWN)], text.len())
}

/// `value` as it is written; of a long one the beginning. Writing ends there.
pub(crate) fn shown(value: impl Display) -> String {
    let mut head = Head { text: String::new(), limit: SHOWN };
    // An error means that the value was cut.
    match write!(head, "{value}") {
        Ok(()) => head.text,
        Err(fmt::Error) => head.text + "… (cut)",
    }
}

/// The first `limit` bytes of `text`, and a mark when there are more.
pub(crate) fn head(text: &str, limit: usize) -> Cow<'_, str> {
    if text.len() <= limit { text.into() } else { format!("{}…", &text[..text.floor_char_boundary(limit)]).into() }
}

/// `text` within `limit` bytes and a mark: of a longer one the middle is left out, because the reason stands at the
/// beginning and the way out at the end.
pub(crate) fn middle(text: String, limit: usize) -> String {
    if text.len() <= limit {
        return text;
    }
    let (from, to) = (text.floor_char_boundary(limit / 2), text.ceil_char_boundary(text.len() - limit / 2));
    format!("{} … ({} bytes cut) … {}", &text[..from], to - from, &text[to..])
}

/// Another library's sentence about a client's value, such as `unknown field "…", expected …`. The value is cut as
/// [`quoted`] does; what was expected stays.
pub(crate) fn sentence(text: &str) -> String {
    let whole = || text.to_owned();
    let Some((open, quote)) = text.char_indices().find(|(_, c)| matches!(c, '"' | '`')) else { return whole() };
    // The value may have quotes of its own, so its end is looked for from behind.
    let close = text.rfind(&format!("{quote}, expected")).or_else(|| text.rfind(quote));
    let Some(close) = close.filter(|&close| close > open + 1 + SHOWN) else { return whole() };
    let (value, rest) = (&text[open + 1..close], &text[close..]);
    let shown = &value[..value.floor_char_boundary(SHOWN)];
    format!("{}{shown}… (cut: it has {} bytes){rest}", &text[..=open], value.len())
}

/// Takes `limit` bytes, and fails at the next.
struct Head {
    text: String,
    limit: usize,
}

impl Write for Head {
    fn write_str(&mut self, more: &str) -> fmt::Result {
        let room = self.limit - self.text.len();
        if more.len() <= room {
            self.text.push_str(more);
            return Ok(());
        }
        self.text.push_str(&more[..more.floor_char_boundary(room)]);
        // Nothing after a character that did not fit.
        self.limit = self.text.len();
        Err(fmt::Error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_values_are_shown_whole() {
        let value = "ä".repeat(50);
        assert_eq!(quoted(&value), format!("\"{value}\""));
        assert_eq!(shown(&value), value);
        assert_eq!(head(&value, 100), value);
        assert_eq!(middle(value.clone(), 100), value);
        let message = "unknown field `imagez`, expected `images` or `options` at line 1 column 9";
        assert_eq!(sentence(message), message);
        assert_eq!(sentence("the JSON ends early"), "the JSON ends early");
    }

    #[test]
    fn long_values_are_cut_between_characters_and_say_so() {
        let value = format!("a{}", "ä".repeat(1000));
        let shown_part = format!("a{}", "ä".repeat(49));
        assert_eq!(quoted(&value), format!("\"{shown_part}\"… (cut: it has 2001 bytes)"));
        assert_eq!(shown(&value), format!("{shown_part}… (cut)"));
        assert_eq!(shown(format_args!("{}{}{}", "x".repeat(99), "ä", "y")), format!("{}… (cut)", "x".repeat(99)));
        assert_eq!(head(&value, 100), format!("{shown_part}…"));
        let cut = middle(format!("{value} at most 7"), 100);
        assert!(cut.starts_with("aä") && cut.contains("bytes cut") && cut.ends_with("ä at most 7"), "{cut}");
        assert!(cut.len() < 150, "{cut}");
    }

    #[test]
    fn a_long_value_in_anothers_sentence_is_cut_and_what_was_expected_stays() {
        for (value, quote, rest) in [
            ("x".repeat(5000), '`', ", expected `images` or `options` at line 1 column 9"),
            ("`, x".repeat(2000), '`', ", expected one of `top_k`, `alpha` at line 1 column 9"),
            ("\\\"".repeat(2000), '"', ", expected an object at line 1 column 9"),
            ("y".repeat(5000), '"', ", which is no class of this model"),
        ] {
            let cut = sentence(&format!("the value {quote}{value}{quote}{rest}"));
            let end = format!("… (cut: it has {} bytes){quote}{rest}", value.len());
            assert!(cut.ends_with(&end) && cut.len() < 200, "{cut}");
            assert!(cut.starts_with(&format!("the value {quote}{}", &value[..100])), "{cut}");
        }
    }
}

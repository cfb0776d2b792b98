//! Options of `nbn serve` from a TOML file, for what neither the command line nor the environment says.
//!
//! A key is a flag's long name, so that the file needs no description of its own, and its values are read by the flags' own
//! parsers.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, anyhow, bail, ensure};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, CommandFactory, FromArgMatches};
use nbn::features::Feature;
use nbn::{show, tell};
use strsim::sorensen_dice;
use toml::{Table, Value};

use crate::Cli;
use crate::serve::Serve;

/// Flags that make no sense in a file.
const NOT_IN_FILES: [&str; 4] = ["config", "print-config", "help", "version"];
/// Values that are not shown.
const SECRET: [&str; 1] = ["api-keys"];

fn command() -> clap::Command {
    let mut cli = Cli::command();
    cli.build();
    cli.find_subcommand("serve").cloned().unwrap_or_default()
}

fn flags(command: &clap::Command) -> impl Iterator<Item = (&str, &Arg)> {
    command.get_arguments().filter_map(|arg| Some((arg.get_long()?, arg)))
}

/// `args`, completed by the file that they name; with `--print-config`, prints all of them and exits.
pub(crate) fn complete(args: Serve, matches: Option<&ArgMatches>) -> anyhow::Result<Serve> {
    let Some(matches) = matches else { return Ok(args) };
    let command = command();
    let completed = match &args.config {
        Some(path) => Some(with_file(path, &command, matches).with_context(|| format!("--config {}", path.display()))?),
        None => None,
    };
    let matches = completed.as_ref().unwrap_or(matches);
    let args = Serve::from_arg_matches(matches)?;
    if args.print_config {
        let shown = show!("{}", printed(&command, matches));
        if let Err(error) = &shown {
            tell!("nbn: {error}");
        }
        std::process::exit(shown.is_err().into());
    }
    Ok(args)
}

/// What the command line would have been with the file's values on it, but for those given there or in the environment.
fn with_file(path: &Path, command: &clap::Command, matches: &ArgMatches) -> anyhow::Result<ArgMatches> {
    let table: Table = std::fs::read_to_string(path)?.parse().context("it is not TOML")?;
    let line = from_table(&table, command, matches)?;
    let given = std::env::args_os().skip_while(|word| word != "serve").skip(1);
    let all = std::iter::once("serve".into()).chain(given).chain(line.into_iter().map(Into::into));
    command.clone().try_get_matches_from(all).map_err(|error| {
        let text = error.render().to_string();
        anyhow!("{}", text.lines().next().unwrap_or_default().trim_start_matches("error: "))
    })
}

fn from_table(table: &Table, command: &clap::Command, matches: &ArgMatches) -> anyhow::Result<Vec<String>> {
    let mut line = Vec::new();
    for (key, value) in table {
        let Some((long, arg)) = flags(command).find(|(long, _)| *long == key && !NOT_IN_FILES.contains(long)) else {
            let near = flags(command)
                .map(|(long, _)| long)
                .filter(|long| !NOT_IN_FILES.contains(long))
                .max_by(|a, b| sorensen_dice(a, key).total_cmp(&sorensen_dice(b, key)))
                .unwrap_or_default();
            bail!("unknown key {key:?}; did you mean {near:?}? Keys are the long flags of `nbn serve --help`");
        };
        let source = matches.value_source(arg.get_id().as_str());
        if matches!(source, Some(ValueSource::CommandLine | ValueSource::EnvVariable)) {
            continue;
        }
        match (arg.get_action(), value) {
            (ArgAction::SetTrue, Value::Boolean(false)) => {}
            (ArgAction::SetTrue, Value::Boolean(true)) => line.push(format!("--{long}")),
            (ArgAction::SetTrue, _) => bail!("{key} is {value}; expected true or false"),
            (ArgAction::Append, Value::Array(values)) => {
                for value in values {
                    line.push(format!("--{long}={}", scalar(key, value)?));
                }
            }
            (_, value) => line.push(format!("--{long}={}", scalar(key, value)?)),
        }
    }
    Ok(line)
}

fn scalar(key: &str, value: &Value) -> anyhow::Result<String> {
    Ok(match value {
        Value::String(text) => text.clone(),
        Value::Integer(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        _ => bail!("{key} is {value}; expected a string or a number"),
    })
}

/// Every option as a TOML line, with where it comes from.
fn printed(command: &clap::Command, matches: &ArgMatches) -> String {
    let mut out = String::new();
    for (long, arg) in flags(command).filter(|(long, _)| !NOT_IN_FILES.contains(long)) {
        let id = arg.get_id().as_str();
        // What the manual does not list is shown only where it is given.
        if arg.is_hide_set() && matches.value_source(id).is_none() {
            continue;
        }
        let values: Vec<String> = matches
            .get_raw(id)
            .map(|values| values.map(|value| value.to_string_lossy().into_owned()).collect())
            .unwrap_or_default();
        let source = match matches.value_source(id) {
            Some(ValueSource::CommandLine) => "flag or file",
            Some(ValueSource::EnvVariable) => "environment",
            Some(_) => "default",
            None => "not set",
        };
        let hidden = SECRET.contains(&long) && !values.is_empty();
        let text = match (arg.get_action(), values.as_slice()) {
            (ArgAction::SetTrue, _) => matches.get_flag(id).to_string(),
            _ if hidden => "\"(hidden)\"".into(),
            (ArgAction::Append, values) => Value::from(values.to_vec()).to_string(),
            (_, [value]) => match value.parse::<i64>() {
                Ok(number) => number.to_string(),
                Err(_) => Value::from(value.clone()).to_string(),
            },
            _ => String::new(),
        };
        // Writing into a string cannot fail.
        let _ = match text.as_str() {
            "" => writeln!(out, "# {long} is not set"),
            text => writeln!(out, "{long} = {text}  # {source}"),
        };
    }
    out
}

/// Checks that need more than one flag.
pub(crate) fn check(args: &Serve) -> anyhow::Result<()> {
    ensure!(
        args.tls_cert.is_some() == args.tls_key.is_some(),
        "--tls-cert and --tls-key belong together: give both or neither"
    );
    if args.grpc_addr.is_some() && !Feature::Grpc.is_built() {
        return Err(Feature::Grpc.missing("--grpc-addr").into());
    }
    ensure!(
        args.max_body_mb <= args.max_buffered_mb,
        "--max-body-mb {} exceeds --max-buffered-mb {}: a body of that size could never be accepted; raise \
         --max-buffered-mb",
        args.max_body_mb,
        args.max_buffered_mb
    );
    for origin in &args.cors_origin {
        let fits = origin == "*" || origin.starts_with("http://") || origin.starts_with("https://");
        ensure!(
            fits && !origin.ends_with('/') && origin.is_ascii(),
            "--cors-origin {origin:?}: expected an origin such as https://example.org, without a path, or *"
        );
    }
    Ok(())
}

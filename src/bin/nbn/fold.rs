//! `nbn fold`: runs the program nbn-fold.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use clap::Args;

/// The program's name.
const PROGRAM: &str = if cfg!(windows) { "nbn-fold.exe" } else { "nbn-fold" };

#[derive(Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Fold {
    /// Command of nbn-fold and its arguments; `nbn fold --help` lists the commands
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    arguments: Vec<OsString>,
}

pub(crate) fn fold(args: Fold) -> anyhow::Result<ExitCode> {
    let Some(program) = program() else {
        bail!(
            "nbn fold runs the program {PROGRAM}, which is neither beside nbn nor on the PATH. It comes with the Python \
             wheel; from the sources: cargo install --locked --path . --features fold --bin nbn-fold, or without \
             installing: cargo run --release --features fold --bin fold -- …"
        );
    };
    let mut command = Command::new(&program);
    command.args(args.arguments);
    run(command).with_context(|| format!("{} cannot be started", program.display()))
}

/// Beside this program, else on the PATH.
fn program() -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|nbn| Some(nbn.canonicalize().ok()?.with_file_name(PROGRAM)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).filter(|folder| folder.is_absolute()).map(|folder| folder.join(PROGRAM));
    beside.into_iter().chain(on_path).find(|program| program.is_file())
}

/// In place of this process: signals and the exit status are the other program's.
#[cfg(unix)]
fn run(mut command: Command) -> std::io::Result<ExitCode> {
    use std::os::unix::process::CommandExt;
    Err(command.exec())
}

#[cfg(not(unix))]
fn run(mut command: Command) -> std::io::Result<ExitCode> {
    let code = command.status()?.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(1)))
}

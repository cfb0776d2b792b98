//! `nbn-fold`: `fold` by the name that it is installed under, since most systems have another `fold`.

#[path = "fold/main.rs"]
mod fold;

fn main() -> std::process::ExitCode {
    fold::main()
}

//! Where pip puts ONNX Runtime's library, seen from where it puts programs.

use std::cmp::Reverse;
use std::fs;
use std::path::{Path, PathBuf};

/// The libraries of the Python package `onnxruntime` in the environment whose programs are in `bin`, later Pythons first.
///
/// Environments, systems and users' folders have `bin/` beside `lib/pythonX.Y/site-packages` (Debian's
/// `dist-packages`, Fedora's `lib64`, macOS's `lib/python`), on Windows `Scripts\\` beside `Lib\\site-packages` or
/// `site-packages`. Source: Python's `sysconfig`, the schemes posix_prefix, posix_user, osx_framework_user, nt, nt_user
/// and venv; Debian's posix_local.
pub(super) fn libraries(bin: &Path) -> Vec<PathBuf> {
    let Some(prefix) = bin.parent() else { return Vec::new() };
    let mut homes = Vec::new();
    for lib in ["lib", "lib64"] {
        let mut pythons: Vec<PathBuf> = entries(&prefix.join(lib))
            .into_iter()
            .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python")))
            .collect();
        pythons.sort_by_key(|path| Reverse(version(path)));
        homes.extend(pythons);
    }
    homes.extend([prefix.join("Lib"), prefix.to_owned()]);
    let mut found = Vec::new();
    for home in homes {
        for packages in ["site-packages", "dist-packages"] {
            let mut libraries: Vec<PathBuf> = entries(&home.join(packages).join("onnxruntime/capi"))
                .into_iter()
                .filter(|path| is_library(path))
                .collect();
            libraries.sort();
            found.extend(libraries);
        }
    }
    // Where names differ only in case for the program, `lib` and `Lib` are one folder.
    found.dedup();
    found
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// 3 and 13 of `python3.13`.
fn version(path: &Path) -> Vec<u32> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    name.trim_start_matches("python").split('.').filter_map(|number| number.parse().ok()).collect()
}

fn is_library(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    name == "onnxruntime.dll"
        || name.starts_with("libonnxruntime.so")
        || (name.starts_with("libonnxruntime.") && name.ends_with(".dylib"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layout_is_found_and_later_pythons_come_first() {
        let library = "libonnxruntime.so.1.28.0";
        for (bin, packages, names) in [
            ("bin", &["lib/python3.9/site-packages", "lib/python3.13/site-packages"][..], &[library][..]),
            ("bin", &["lib/python3.11/dist-packages"], &[library]),
            ("bin", &["lib64/python3.12/site-packages"], &[library]),
            ("bin", &["lib/python/site-packages"], &["libonnxruntime.1.28.0.dylib"]),
            ("Scripts", &["Lib/site-packages"], &["onnxruntime.dll"]),
            ("Scripts", &["site-packages"], &["onnxruntime.dll"]),
        ] {
            let prefix = tempfile::tempdir().unwrap();
            let mut placed = Vec::new();
            for packages in packages {
                let capi = prefix.path().join(packages).join("onnxruntime/capi");
                fs::create_dir_all(&capi).unwrap();
                for other in ["libonnxruntime_providers_shared.so", "onnxruntime_pybind11_state.so", "__init__.py"] {
                    fs::write(capi.join(other), "").unwrap();
                }
                for name in names {
                    fs::write(capi.join(name), "").unwrap();
                    placed.insert(0, capi.join(name));
                }
            }
            assert_eq!(libraries(&prefix.path().join(bin)), placed);
        }
        assert_eq!(libraries(Path::new("/")), Vec::<PathBuf>::new());
    }
}

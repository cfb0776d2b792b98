//! Finds and loads ONNX Runtime's shared library, once per process.

mod python;

use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use ort::environment::Environment;

#[cfg(target_os = "macos")]
const NAMES: [&str; 2] = ["libonnxruntime.dylib", "libonnxruntime.1.28.0.dylib"];
#[cfg(target_os = "windows")]
const NAMES: [&str; 1] = ["onnxruntime.dll"];
#[cfg(not(any(target_os = "macos", target_os = "windows")))]
const NAMES: [&str; 3] = ["libonnxruntime.so", "libonnxruntime.so.1", "libonnxruntime.so.1.28.0"];

/// The loaded library and its one environment.
pub struct Library {
    pub(super) environment: Environment,
    path: PathBuf,
}

/// No candidate could be loaded.
#[derive(Debug, thiserror::Error)]
#[error(
    "ONNX Runtime's library could not be loaded. Tried:\n{}\nInstall ONNX Runtime 1.28 (it is inside the Python wheel \
     onnxruntime==1.28.0), then set ORT_DYLIB_PATH, or pass --onnxruntime, with the path of its shared library",
    .tried.iter().map(|(path, why)| format!("  {}: {why}", path.display())).collect::<Vec<_>>().join("\n")
)]
pub struct LibraryError {
    /// Each candidate and why it was not taken, in order.
    pub tried: Vec<(PathBuf, String)>,
}

static LIBRARY: OnceLock<Library> = OnceLock::new();
static LOADING: Mutex<()> = Mutex::new(());

impl Library {
    /// Loads the library: `explicit` (a flag), `ORT_DYLIB_PATH`, beside the executable, the Python package that was
    /// installed with the executable, the copy that the build placed, the system's. The first two are orders: if one is given and fails, nothing else is tried.
    ///
    /// # Errors
    /// Lists every candidate with the loader's own words.
    pub fn load(explicit: Option<&Path>) -> Result<&'static Self, LibraryError> {
        let _one_at_a_time = LOADING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(library) = LIBRARY.get() {
            return Ok(library);
        }
        let mut tried = Vec::new();
        for path in candidates(explicit) {
            if path.components().count() > 1 && !path.is_file() {
                tried.push((path, "no such file".into()));
                continue;
            }
            let loaded = ort::init_from(&path).map_err(|error| innermost(&error)).and_then(|builder| {
                builder.with_name("nbn").with_telemetry(false).build().map_err(|error| error.to_string())
            });
            match loaded {
                Ok(environment) => return Ok(LIBRARY.get_or_init(|| Self { environment, path })),
                Err(reason) => tried.push((path, reason)),
            }
        }
        Err(LibraryError { tried })
    }

    /// The file that was loaded.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn candidates(explicit: Option<&Path>) -> Vec<PathBuf> {
    if let Some(path) = explicit {
        return vec![path.to_owned()];
    }
    if let Some(path) = std::env::var_os("ORT_DYLIB_PATH") {
        return vec![path.into()];
    }
    let mut paths = Vec::new();
    // A link to the program lies elsewhere than its libraries.
    let program = std::env::current_exe().and_then(|program| program.canonicalize()).ok();
    if let Some(folder) = program.as_deref().and_then(Path::parent) {
        paths.extend(NAMES.iter().map(|name| folder.join(name)));
        paths.extend(python::libraries(folder));
    }
    paths.extend(option_env!("NBN_BUILD_ONNXRUNTIME").map(PathBuf::from));
    paths.extend(NAMES.iter().take(2).map(PathBuf::from));
    paths
}

/// `ort`'s own message hides the loader's; the innermost source is the one that helps.
fn innermost(error: &ort::LoadDynamicError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = inner.to_string();
        source = inner.source();
    }
    text
}

/// Turns ONNX Runtime's own telemetry off. Call first in `main`, before any thread starts.
pub fn disable_telemetry() {
    // SAFETY: documented to be called while the process has one thread.
    #[allow(unsafe_code)]
    unsafe {
        std::env::set_var("ORT_DISABLE_TELEMETRY", "1");
    }
}

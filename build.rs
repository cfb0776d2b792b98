//! Places ONNX Runtime's library in the user's cache folder, once, and tells the crate where it is.
//!
//! The library comes out of the pinned `onnxruntime` Python wheel, fetched by pip with its hash checked.
//! Nothing happens when `ORT_DYLIB_PATH` or `NBN_SKIP_ONNXRUNTIME_DOWNLOAD` is set. A failure is a warning:
//! the programs look for the library again when they start, and then say what they tried.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const VERSION: &str = "1.28.0";

/// (target os, target arch, pip platform, library in the wheel, SHA-256 of the cp311 wheel)
const WHEELS: [(&str, &str, &str, &str, &str); 4] = [
    (
        "linux",
        "x86_64",
        "manylinux_2_28_x86_64",
        "libonnxruntime.so.1.28.0",
        "a166b78ee04f3a37fa1ef82034b6a3ce96d9684e582d4d30b296de83e9998bb5",
    ),
    (
        "linux",
        "aarch64",
        "manylinux_2_28_aarch64",
        "libonnxruntime.so.1.28.0",
        "8d66f9ceb29909c70839e4e4fb3435c7b490050d8f162bd5f3aba4ca01ee517f",
    ),
    (
        "macos",
        "aarch64",
        "macosx_14_0_arm64",
        "libonnxruntime.1.28.0.dylib",
        "f5c5daabd28aad610f83fdcf32acec8fb57e6adc6c6a39fe2a3c755db957b410",
    ),
    (
        "windows",
        "x86_64",
        "win_amd64",
        "onnxruntime.dll",
        "0d650aeee29368414367b65529e90afe4bf1bab76254789063b8b2f7ea3013c8",
    ),
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "swagger-ui")]
    if let Err(error) = place_swagger_ui() {
        println!("cargo::error=Swagger UI's archive cannot be unpacked: {error}");
    }
    for name in ["ORT_DYLIB_PATH", "NBN_SKIP_ONNXRUNTIME_DOWNLOAD", "XDG_CACHE_HOME", "HOME"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    if env::var_os("ORT_DYLIB_PATH").is_some() || env::var_os("NBN_SKIP_ONNXRUNTIME_DOWNLOAD").is_some() {
        return;
    }
    match place_library() {
        Ok(path) => {
            // Built again if the cache is emptied.
            println!("cargo:rerun-if-changed={}", path.display());
            println!("cargo:rustc-env=NBN_BUILD_ONNXRUNTIME={}", path.display());
        }
        Err(reason) => {
            println!("cargo:warning=ONNX Runtime {VERSION} was not placed; the programs will look for it at run time.");
            for line in reason.lines() {
                println!("cargo:warning={line}");
            }
        }
    }
}

/// Writes Swagger UI's files that `serve/page.rs` includes into the build's folder.
#[cfg(feature = "swagger-ui")]
fn place_swagger_ui() -> Result<(), Box<dyn std::error::Error>> {
    use std::io::{Cursor, Read};
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let mut archive = build_zip::ZipArchive::new(Cursor::new(utoipa_swagger_ui_vendored::SWAGGER_UI_VENDORED))?;
    for name in ["swagger-ui-bundle.js", "swagger-ui.css"] {
        let path = archive.file_names().find(|path| path.ends_with(&format!("/dist/{name}"))).map(str::to_owned);
        let mut content = Vec::new();
        archive.by_name(&path.ok_or(format!("it has no {name}"))?)?.read_to_end(&mut content)?;
        fs::write(out.join(name), content)?;
    }
    Ok(())
}

fn place_library() -> Result<PathBuf, String> {
    let os = env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    let arch = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    let Some((_, _, platform, file, sha256)) = WHEELS.iter().find(|w| w.0 == os && w.1 == arch) else {
        return Err(format!("no pinned wheel for {os}/{arch}: install ONNX Runtime {VERSION} and set ORT_DYLIB_PATH"));
    };
    let folder = cache_folder(&os)?.join(format!("onnxruntime-{VERSION}-{}", &sha256[..12]));
    let library = folder.join(file);
    if library.is_file() {
        return Ok(library);
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?).join("wheel");
    fs::create_dir_all(&out).map_err(|e| format!("{}: {e}", out.display()))?;
    let requirements = out.join("requirements.txt");
    fs::write(&requirements, format!("onnxruntime=={VERSION} --hash=sha256:{sha256}\n")).map_err(|e| e.to_string())?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"])
        .args(["--only-binary=:all:", "--require-hashes", "--platform", platform])
        .args(["--implementation", "cp", "--python-version", "3.11", "--dest"])
        .arg(&out)
        .arg("-r")
        .arg(&requirements);
    run(pip, "python3 with pip fetches the wheel (Debian: apt-get install python3 python3-pip)")?;
    fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut unzip = Command::new("python3");
    unzip
        .arg("-c")
        .arg(
            "import glob,os,sys,zipfile\n\
             wheel=glob.glob(os.path.join(sys.argv[1],'onnxruntime-*.whl'))[0]\n\
             data=zipfile.ZipFile(wheel).read('onnxruntime/capi/'+sys.argv[2])\n\
             part=sys.argv[3]+'.part%d'%os.getpid()\n\
             open(part,'wb').write(data)\n\
             os.utime(part,(0,0))\n\
             os.replace(part,sys.argv[3])",
        )
        .arg(&out)
        .arg(file)
        .arg(&library);
    // The old time of change: cargo builds again when a watched file is newer than the build that made it.
    run(unzip, "python3 takes the library out of the wheel")?;
    let _ = fs::remove_dir_all(&out);
    Ok(library)
}

fn cache_folder(os: &str) -> Result<PathBuf, String> {
    let home = || env::var_os("HOME").map(PathBuf::from).ok_or("neither XDG_CACHE_HOME nor HOME is set");
    let base = match (env::var_os("XDG_CACHE_HOME"), os) {
        (Some(path), _) if Path::new(&path).is_absolute() => PathBuf::from(path),
        (_, "macos") => home()?.join("Library/Caches"),
        (_, "windows") => PathBuf::from(env::var_os("LOCALAPPDATA").ok_or("LOCALAPPDATA is not set")?),
        _ => home()?.join(".cache"),
    };
    Ok(base.join("nbn"))
}

fn run(mut command: Command, purpose: &str) -> Result<(), String> {
    let output = command.output().map_err(|e| format!("{purpose}: python3 could not be started: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{purpose}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)))
}

//! What this build of the programs has, and what it says of the rest.

/// A part that a build can leave out. What each one is for stands in Cargo.toml.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "Cargo.toml explains them")]
pub enum Feature {
    Serve,
    Fold,
    Train,
    Grpc,
    ObjectStores,
    Otlp,
    Parquet,
    SwaggerUi,
    Tls,
    Cuda,
}

impl Feature {
    const ALL: [Self; 10] = [
        Self::Serve,
        Self::Fold,
        Self::Train,
        Self::Grpc,
        Self::ObjectStores,
        Self::Otlp,
        Self::Parquet,
        Self::SwaggerUi,
        Self::Tls,
        Self::Cuda,
    ];

    /// As Cargo.toml calls it, and whether this build has it.
    fn entry(self) -> (&'static str, bool) {
        match self {
            Self::Serve => ("serve", cfg!(feature = "serve")),
            Self::Fold => ("fold", cfg!(feature = "fold")),
            Self::Train => ("train", cfg!(feature = "train")),
            Self::Grpc => ("grpc", cfg!(feature = "grpc")),
            Self::ObjectStores => ("object-stores", cfg!(feature = "object-stores")),
            Self::Otlp => ("otlp", cfg!(feature = "otlp")),
            Self::Parquet => ("parquet", cfg!(feature = "parquet")),
            Self::SwaggerUi => ("swagger-ui", cfg!(feature = "swagger-ui")),
            Self::Tls => ("tls", cfg!(feature = "tls")),
            Self::Cuda => ("cuda", cfg!(feature = "cuda")),
        }
    }

    /// Whether this build has it.
    #[must_use]
    pub fn is_built(self) -> bool {
        self.entry().1
    }

    /// What to give to `--features` for a build with this one beside those that this build has.
    fn with_those_built(self) -> String {
        let by_default = [Self::Serve, Self::Fold];
        let wanted = |other: &Self| *other == self || (other.is_built() && !by_default.contains(other));
        Self::ALL.into_iter().filter(wanted).map(|feature| feature.entry().0).collect::<Vec<_>>().join(",")
    }

    /// That `wanted` is not in this build, and how to get one that has it.
    #[must_use]
    pub fn missing(self, wanted: impl Into<String>) -> Missing {
        Missing { wanted: wanted.into(), feature: self }
    }
}

/// Something needs a feature that this build does not have.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "{wanted} needs the feature `{0}`, which this program was built without: build it with `cargo build --release \
     --features {1}`, or install the Python wheel or the container, which include it",
    feature.entry().0, feature.with_those_built()
)]
pub struct Missing {
    wanted: String,
    feature: Feature,
}

/// What `--version` prints behind the program's name: the version, and a line with the features of this build.
#[must_use]
pub fn long_version() -> String {
    format!("{}\nfeatures: {}", env!("CARGO_PKG_VERSION"), built())
}

/// The features of this build, as `--version` lists them.
fn built() -> String {
    let names = Feature::ALL.iter().map(|feature| feature.entry()).filter(|(_, built)| *built);
    names.map(|(name, _)| name).collect::<Vec<_>>().join(" ")
}

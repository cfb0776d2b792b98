//! An ONNX file with its weights.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::OnnxError;
use super::proto::{Graph, Model, Node, Tensor, ValueInfo, kind};
use super::wire::{self, MAX_MESSAGE};

/// Newest `ir_version` that ONNX Runtime 1.28 reads.
const NEWEST_IR: i64 = 13;
/// Oldest and newest version of ONNX's operators that are read.
const OPSETS: std::ops::RangeInclusive<i64> = 11..=26;
/// Domains of operators that ONNX Runtime has, besides those that a file defines by functions.
const DOMAINS: [&str; 4] = ["", "ai.onnx", "ai.onnx.ml", "com.microsoft"];
/// Operators that draw.
const RANDOM: [&str; 6] =
    ["Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"];
/// Characters of a name that an error quotes.
const QUOTED: usize = 100;

/// A network, read from an ONNX file or made from a checkpoint.
#[derive(Debug, Clone)]
pub struct Network {
    pub(crate) model: Model,
    /// Where its external data lies.
    pub(super) folder: PathBuf,
}

/// Who makes and who reads each value.
pub(crate) struct Uses {
    /// The node that makes a value, by its index.
    pub(crate) made: HashMap<String, usize>,
    /// How many inputs and outputs name a value; graphs within nodes count, too.
    readers: HashMap<String, usize>,
    /// The outputs of the graph.
    outputs: HashSet<String>,
}

impl Uses {
    pub(crate) fn of(graph: &Graph) -> Self {
        let mut readers = HashMap::new();
        let mut read = |name: &str| *readers.entry(name.to_owned()).or_insert(0) += 1;
        fn all(nodes: &[Node], read: &mut dyn FnMut(&str)) {
            for node in nodes {
                node.input.iter().for_each(|name| read(name));
                for graph in node.graphs() {
                    all(&graph.node, read);
                    graph.output.iter().filter_map(|info| info.name.as_deref()).for_each(&mut *read);
                }
            }
        }
        all(&graph.node, &mut read);
        let outputs: HashSet<String> = graph.output.iter().filter_map(|info| info.name.clone()).collect();
        outputs.iter().for_each(|name| read(name));
        let made = graph.node.iter().enumerate();
        let made = made.flat_map(|(n, node)| node.output.iter().map(move |name| (name.clone(), n))).collect();
        Self { made, readers, outputs }
    }

    /// How many read it.
    pub(crate) fn readers(&self, name: &str) -> usize {
        self.readers.get(name).copied().unwrap_or(0)
    }

    /// Whether it is an output of the graph.
    pub(crate) fn is_output(&self, name: &str) -> bool {
        self.outputs.contains(name)
    }
}

impl Network {
    /// Reads the file at `path`. Weights in other files are read when they are looked at.
    ///
    /// # Errors
    /// When it cannot be read, is damaged, or is of a form that cannot be folded.
    pub fn load(path: &Path) -> Result<Self, OnnxError> {
        let read = |cause| OnnxError::Read { path: path.to_owned(), cause };
        let metadata = fs::metadata(path).map_err(read)?;
        if !metadata.is_file() {
            return OnnxError::refused("it is not a regular file: give the network's file itself");
        }
        if metadata.len() > MAX_MESSAGE as u64 {
            return OnnxError::refused(
                "it is larger than 2 GiB, which protobuf cannot hold: export it with external data",
            );
        }
        let bytes = Bytes::from(fs::read(path).map_err(read)?);
        if let Some(what) = foreign(&bytes) {
            return OnnxError::refused(format!("it is no ONNX file, but {what}"));
        }
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Self::of_bytes(&bytes, folder)
    }

    /// Reads a file's bytes; external data lies in `folder`.
    ///
    /// # Errors
    /// As [`Network::load`].
    pub fn of_bytes(bytes: &Bytes, folder: &Path) -> Result<Self, OnnxError> {
        let model: Model = wire::decode(bytes)?;
        let network = Self { model, folder: folder.to_owned() };
        network.is_readable()?;
        Ok(network)
    }

    /// A network that is made here, with all its weights within.
    pub(crate) fn of_model(model: Model) -> Self {
        Self { model, folder: PathBuf::new() }
    }

    /// The file's bytes.
    pub fn encode(&self) -> Vec<u8> {
        wire::encode(&self.model)
    }

    /// The network with the value `name` among its outputs, its weights where [`Network::gather`] puts them, and its functions in
    /// their place.
    ///
    /// # Errors
    /// When a weight cannot be read.
    pub(crate) fn showing(mut self, name: &str) -> Result<Self, OnnxError> {
        super::inline::inline(&mut self.model)?;
        self.gather()?;
        let shown = ValueInfo { name: Some(name.to_owned()), ..ValueInfo::default() };
        let graph = self.graph_mut();
        if !graph.output.iter().any(|info| info.name.as_deref() == Some(name)) {
            graph.output.push(shown);
        }
        Ok(self)
    }

    /// What wrote the file, and which version of it.
    pub fn producer(&self) -> Option<String> {
        let text = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let name = text(&self.model.producer_name)?;
        Some(text(&self.model.producer_version).map_or_else(|| name.clone(), |version| format!("{name} {version}")))
    }

    /// The number of nodes.
    pub fn nodes(&self) -> usize {
        self.graph().node.len()
    }

    fn is_readable(&self) -> Result<(), OnnxError> {
        let Some(graph) = &self.model.graph else {
            return OnnxError::refused("it has no graph: it is empty, or no ONNX file");
        };
        let ir = self.model.ir_version.unwrap_or_default();
        if !(3..=NEWEST_IR).contains(&ir) {
            return OnnxError::refused(format!(
                "its ir_version is {ir}; this build reads 3 to {NEWEST_IR}: export it with another version of onnx"
            ));
        }
        let opset = self.opset();
        if !OPSETS.contains(&opset) {
            return OnnxError::refused(format!(
                "its operators are of opset {opset}; this build reads {} to {}: export it with opset_version=17",
                OPSETS.start(),
                OPSETS.end()
            ));
        }
        let own = self.model.functions.iter();
        let own: HashSet<(&str, &str)> = own.map(|f| (text(f.domain.as_deref()), text(f.name.as_deref()))).collect();
        let bodies = self.model.functions.iter().flat_map(|f| &f.node);
        for node in graph.node.iter().chain(bodies) {
            is_known(node, &own)?;
        }
        for tensor in &graph.initializer {
            if [kind::FLOAT16, kind::BFLOAT16].contains(&tensor.data_type.unwrap_or_default()) {
                return OnnxError::refused(format!(
                    "its weight {} is {}: the fold works on 32-bit floats; export the network in float32 \
                     (model.float() in PyTorch)",
                    quoted(tensor.name()),
                    kind::name(tensor.data_type.unwrap_or_default())
                ));
            }
        }
        let bodies = self.model.functions.iter().flat_map(|function| &function.node);
        self.fills(&graph.initializer, graph.node.iter().chain(bodies))?;
        self.check("")
    }

    /// The version of ONNX's own operators.
    pub(crate) fn opset(&self) -> i64 {
        let own = self.model.opset_import.iter().find(|import| ["", "ai.onnx"].contains(&import.domain()));
        own.and_then(|import| import.version).unwrap_or_default()
    }

    pub(crate) fn graph(&self) -> &Graph {
        static NONE: std::sync::OnceLock<Graph> = std::sync::OnceLock::new();
        self.model.graph.as_ref().unwrap_or_else(|| NONE.get_or_init(Graph::default))
    }

    pub(crate) fn graph_mut(&mut self) -> &mut Graph {
        self.model.graph.get_or_insert_default()
    }

    /// Drops nodes and constants that no output needs.
    pub(crate) fn prune(&mut self) {
        let graph = self.graph_mut();
        let uses = Uses::of(graph);
        let mut needed: HashSet<String> = graph.output.iter().filter_map(|info| info.name.clone()).collect();
        let mut open: Vec<String> = needed.iter().cloned().collect();
        let mut kept = vec![false; graph.node.len()];
        while let Some(name) = open.pop() {
            let Some(&n) = uses.made.get(&name) else { continue };
            if std::mem::replace(&mut kept[n], true) {
                continue;
            }
            let mut read = |name: &str| {
                if needed.insert(name.to_owned()) {
                    open.push(name.to_owned());
                }
            };
            fn all(node: &Node, read: &mut dyn FnMut(&str)) {
                node.input.iter().filter(|name| !name.is_empty()).for_each(|name| read(name));
                for graph in node.graphs() {
                    graph.node.iter().for_each(|node| all(node, read));
                    graph.output.iter().filter_map(|info| info.name.as_deref()).for_each(&mut *read);
                }
            }
            all(&graph.node[n], &mut read);
        }
        let mut kept = kept.into_iter();
        graph.node.retain(|_| kept.next().unwrap_or(false));
        graph.initializer.retain(|tensor| needed.contains(tensor.name()));
        let made: HashSet<&String> = graph.node.iter().flat_map(|node| &node.output).collect();
        graph.value_info.retain(|info| info.name.as_ref().is_some_and(|name| made.contains(name)));
        graph.quantization_annotation.retain(|a| a.tensor_name.as_ref().is_some_and(|name| needed.contains(name)));
    }

    /// Checks that every value is made once, and before it is read.
    ///
    /// # Errors
    /// Names `pass` and the value.
    pub(crate) fn check(&self, pass: &str) -> Result<(), OnnxError> {
        let graph = self.graph();
        let mut there: HashSet<&str> = graph.initializer.iter().map(Tensor::name).collect();
        if there.len() != graph.initializer.len() {
            return OnnxError::refused(format!("{}two of its weights have one name", after(pass)));
        }
        there.extend(graph.sparse_initializer.iter().filter_map(|s| s.values.as_ref()).map(Tensor::name));
        there.extend(graph.input.iter().filter_map(|info| info.name.as_deref()));
        follow(&graph.node, &mut there, pass)?;
        match graph.output.iter().map(|info| info.name.as_deref().unwrap_or_default()).find(|o| !there.contains(o)) {
            Some(output) => OnnxError::refused(format!("{}nothing makes its output {}", after(pass), quoted(output))),
            None if graph.output.is_empty() => OnnxError::refused(format!("{}it has no output", after(pass))),
            None => Ok(()),
        }
    }
}

/// What a file is that begins as no ONNX file does, and what to do.
fn foreign(bytes: &[u8]) -> Option<&'static str> {
    const KINDS: [(&[u8], &str); 5] = [
        (b"version https://git-lfs", "a pointer of Git LFS: run `git lfs pull`"),
        (b"PK\x03\x04", "a zip archive, as torch.save writes: a checkpoint's name ends in .pth, .pt or .tar"),
        (b"\x80\x02", "a pickle, as torch.save writes: a checkpoint's name ends in .pth, .pt or .tar"),
        (b"\x1F\x8B", "compressed by gzip: unpack it"),
        (b"<", "a web page: download the file itself"),
    ];
    let is_safetensors = || bytes.get(8) == Some(&b'{') && bytes.get(4..8) == Some(&[0; 4]);
    let known = KINDS.into_iter().find(|(begin, _)| bytes.starts_with(begin)).map(|(_, what)| what);
    known.or_else(|| is_safetensors().then_some("safetensors: such a checkpoint's name ends in .safetensors"))
}

/// How a sentence about what a pass left begins.
fn after(pass: &str) -> String {
    if pass.is_empty() { String::new() } else { format!("after {pass}, ") }
}

/// Walks through nodes in their order; `there` are the values so far.
fn follow<'a>(nodes: &'a [Node], there: &mut HashSet<&'a str>, pass: &str) -> Result<(), OnnxError> {
    for node in nodes {
        if let Some(name) = node.input.iter().find(|name| !name.is_empty() && !there.contains(name.as_str())) {
            return OnnxError::refused(format!(
                "{}node {} reads {}, which no node before it makes: the graph has a circle, or is damaged",
                after(pass),
                quoted(node.label()),
                quoted(name)
            ));
        }
        for graph in node.graphs() {
            let mut within = there.clone();
            within.extend(graph.initializer.iter().map(Tensor::name));
            within.extend(graph.input.iter().filter_map(|info| info.name.as_deref()));
            follow(&graph.node, &mut within, pass)?;
        }
        for name in node.output.iter().filter(|name| !name.is_empty()) {
            if !there.insert(name) {
                return OnnxError::refused(format!("{}{} is made twice", after(pass), quoted(name)));
            }
        }
    }
    Ok(())
}

fn text(text: Option<&str>) -> &str {
    text.unwrap_or_default()
}

fn is_known(node: &Node, own: &HashSet<(&str, &str)>) -> Result<(), OnnxError> {
    let domain = text(node.domain.as_deref());
    if !DOMAINS.contains(&domain) && !own.contains(&(domain, node.op())) {
        return OnnxError::refused(format!(
            "node {} is of operator {} of {}, which is not one of ONNX's: networks with operators of their own cannot \
             be served",
            quoted(node.label()),
            quoted(node.op()),
            quoted(domain)
        ));
    }
    if node.is_standard() && RANDOM.contains(&node.op()) {
        return OnnxError::refused(format!(
            "node {} is {}, which gives other values each time: export the network in evaluation mode (model.eval())",
            quoted(node.label()),
            node.op()
        ));
    }
    node.graphs().flat_map(|graph| &graph.node).try_for_each(|node| is_known(node, own))
}

/// A name in an error, cut where it is long.
pub(crate) fn quoted(name: &str) -> String {
    match name.char_indices().nth(QUOTED) {
        Some((at, _)) => format!("{:?}…", &name[..at]),
        None => format!("{name:?}"),
    }
}

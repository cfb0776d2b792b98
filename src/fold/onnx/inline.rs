//! Puts the nodes of a file's own functions where they are called, as PyTorch's newer exporter writes every BatchNorm.

use std::collections::{HashMap, HashSet};

use super::OnnxError;
use super::proto::{Attribute, Function, Graph, Model, Node, OperatorSet};
use super::wire::{self, MAX_MESSAGE};

/// Most nodes that functions may become: they may call each other.
const MAX_NODES: usize = 1 << 20;

/// Domain, name and overload.
type Key = (String, String, String);

type Functions = HashMap<Key, Function>;

/// Leaves no call of a function of the file, and no function.
///
/// # Errors
/// When functions call each other in a circle, become too many nodes, or are written in another version of ONNX's
/// operators than the graph.
pub(crate) fn inline(model: &mut Model) -> Result<(), OnnxError> {
    if model.functions.is_empty() {
        return Ok(());
    }
    let mut functions = Functions::new();
    for mut function in std::mem::take(&mut model.functions) {
        // Each call gets the function's constants; as bytes they are shared.
        let attributes = function.node.iter_mut().flat_map(|node| &mut node.attribute);
        for tensor in attributes.filter_map(|attribute| attribute.t.as_mut()) {
            let floats = std::mem::take(&mut tensor.float_data.0);
            if !floats.is_empty() {
                tensor.raw_data = Some(floats.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into());
            }
        }
        adopt(&mut model.opset_import, &function)?;
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        functions.insert((text(&function.domain), text(&function.name), text(&function.overload)), function);
    }
    let mut inliner = Inliner { functions, calls: 0, nodes: 0, constants: 0 };
    if let Some(graph) = &mut model.graph {
        inliner.graph(graph, &mut Vec::new())?;
    }
    let left: HashSet<&str> = inliner.functions.keys().map(|(domain, ..)| domain.as_str()).collect();
    model.opset_import.retain(|import| {
        let domain = import.domain.as_deref().unwrap_or_default();
        domain.is_empty() || !left.contains(domain)
    });
    Ok(())
}

/// The function's nodes will stand in the graph: what they import, it imports.
fn adopt(imports: &mut Vec<OperatorSet>, function: &Function) -> Result<(), OnnxError> {
    for wanted in &function.opset_import {
        match imports.iter().find(|import| import.domain() == wanted.domain()) {
            None => imports.push(wanted.clone()),
            Some(import) if import.version == wanted.version || !wanted.domain().is_empty() => {}
            Some(import) => {
                return Err(OnnxError::Refused(format!(
                    "its function {} is written in opset {}, the graph in opset {}: export the network again with one \
                     opset",
                    function.name.as_deref().unwrap_or_default(),
                    wanted.version.unwrap_or_default(),
                    import.version.unwrap_or_default()
                )));
            }
        }
    }
    Ok(())
}

struct Inliner {
    functions: Functions,
    /// Calls so far, which tell their values' names apart.
    calls: usize,
    nodes: usize,
    /// Bytes of the constants that calls have brought so far.
    constants: usize,
}

impl Inliner {
    fn graph(&mut self, graph: &mut Graph, within: &mut Vec<Key>) -> Result<(), OnnxError> {
        graph.node = self.nodes(std::mem::take(&mut graph.node), within)?;
        Ok(())
    }

    /// `within` are the functions whose nodes these are.
    fn nodes(&mut self, nodes: Vec<Node>, within: &mut Vec<Key>) -> Result<Vec<Node>, OnnxError> {
        let mut out = Vec::with_capacity(nodes.len());
        for mut node in nodes {
            self.nodes += 1;
            if self.nodes > MAX_NODES {
                return Err(OnnxError::Refused(format!("its functions become more than {MAX_NODES} nodes")));
            }
            for graph in node.graphs_mut() {
                self.graph(graph, within)?;
            }
            let text = |text: &Option<String>| text.clone().unwrap_or_default();
            let key = (text(&node.domain), text(&node.op_type), text(&node.overload));
            let Some(function) = self.functions.get(&key) else {
                out.push(node);
                continue;
            };
            let name = key.1.clone();
            if within.contains(&key) {
                return Err(OnnxError::Refused(format!("its function {name} calls itself")));
            }
            self.calls += 1;
            let body = Call::new(&node, function, self.calls).body(function);
            let tensors = body.iter().flat_map(|node| &node.attribute).filter_map(|attribute| attribute.t.as_ref());
            self.constants += tensors.map(wire::Message::len).sum::<usize>();
            if self.constants > MAX_MESSAGE {
                return Err(OnnxError::Refused(format!(
                    "the constants of its function {name} become more than {MAX_MESSAGE} bytes, one for each call: export \
                     it with its weights as initialisers"
                )));
            }
            within.push(key);
            out.extend(self.nodes(body, within)?);
            within.pop();
        }
        Ok(out)
    }
}

/// One call of a function.
struct Call<'a> {
    node: &'a Node,
    /// Names in the function's nodes → names in the graph's.
    names: HashMap<&'a str, String>,
    defaults: &'a [Attribute],
    prefix: String,
}

impl<'a> Call<'a> {
    fn new(node: &'a Node, function: &'a Function, number: usize) -> Self {
        let given = |actual: &[String], n: usize| actual.get(n).cloned().unwrap_or_default();
        let mut names = HashMap::new();
        for (n, formal) in function.input.iter().enumerate() {
            names.insert(formal.as_str(), given(&node.input, n));
        }
        for (n, formal) in function.output.iter().enumerate() {
            let actual = given(&node.output, n);
            // A result that nobody asked for is one of the values between.
            if !actual.is_empty() {
                names.insert(formal.as_str(), actual);
            }
        }
        Self { node, names, defaults: &function.attribute_proto, prefix: format!("call{number}") }
    }

    fn name(&self, name: &str) -> String {
        match self.names.get(name) {
            Some(actual) => actual.clone(),
            None if name.is_empty() => String::new(),
            None => format!("{}/{name}", self.prefix),
        }
    }

    fn body(&self, function: &Function) -> Vec<Node> {
        function.node.iter().enumerate().map(|(n, node)| self.placed(n, node)).collect()
    }

    /// Node `n` of the function, or of a graph within.
    fn placed(&self, n: usize, node: &Node) -> Node {
        let mut node = node.clone();
        // Names of nodes may not come twice.
        let own = node.name.take().filter(|name| !name.is_empty()).unwrap_or_else(|| n.to_string());
        node.name = Some(format!("{}/{own}", self.node.label()));
        node.input.iter_mut().chain(&mut node.output).for_each(|name| *name = self.name(name));
        node.attribute = node.attribute.into_iter().filter_map(|attribute| self.filled(attribute)).collect();
        for graph in node.graphs_mut() {
            graph.node = graph.node.iter().enumerate().map(|(n, node)| self.placed(n, node)).collect();
            graph.initializer.iter_mut().for_each(|tensor| rename(&mut tensor.name, |name| self.name(name)));
            let infos = graph.input.iter_mut().chain(&mut graph.output).chain(&mut graph.value_info);
            infos.for_each(|info| rename(&mut info.name, |name| self.name(name)));
        }
        node
    }

    /// The attribute, with the call's or the function's own value where it refers to one.
    fn filled(&self, attribute: Attribute) -> Option<Attribute> {
        let Some(wanted) = attribute.ref_attr_name.as_deref().filter(|name| !name.is_empty()) else {
            return Some(attribute);
        };
        let named = |attributes: &[Attribute]| attributes.iter().find(|a| a.name.as_deref() == Some(wanted)).cloned();
        let value = named(&self.node.attribute).or_else(|| named(self.defaults))?;
        Some(Attribute { name: attribute.name, ..value })
    }
}

fn rename(name: &mut Option<String>, to: impl Fn(&str) -> String) {
    if let Some(name) = name {
        *name = to(name);
    }
}

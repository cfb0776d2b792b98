//! Evaluates what depends on constants alone, such as the effective weight of a normalised BatchNorm.

use std::collections::HashMap;

use super::super::evaluate::evaluate;
use super::super::proto::{Node, Tensor};
use super::super::value::Value;
use super::super::{Network, OnnxError};

/// The constants of a network: its weights, and what can be computed from them.
pub(crate) struct Constants {
    tensors: HashMap<String, Tensor>,
    /// Nodes that are computed, by their index.
    computed: Vec<usize>,
    /// Nodes of operators that are not evaluated, though all of their inputs are constant.
    pub(crate) left: Vec<String>,
}

impl Constants {
    /// Computes every node whose inputs are all constant.
    ///
    /// # Errors
    /// When a weight cannot be read.
    pub(crate) fn of(network: &Network) -> Result<Self, OnnxError> {
        let graph = network.graph();
        let weights = graph.initializer.iter().map(|tensor| (tensor.name().to_owned(), tensor.clone()));
        let mut constants = Self { tensors: weights.collect(), computed: Vec::new(), left: Vec::new() };
        for (n, node) in graph.node.iter().enumerate() {
            let fixed = node.input.iter().all(|name| name.is_empty() || constants.tensors.contains_key(name));
            if !fixed || (node.input.is_empty() && !node.is("Constant")) {
                continue;
            }
            match constants.compute(network, node)? {
                Some(tensor) => {
                    constants.tensors.insert(tensor.name().to_owned(), tensor);
                    constants.computed.push(n);
                }
                None => constants.left.push(format!("{} ({})", node.label(), node.op())),
            }
        }
        Ok(constants)
    }

    fn compute(&self, network: &Network, node: &Node) -> Result<Option<Tensor>, OnnxError> {
        let [output] = &node.output[..] else { return Ok(None) };
        // Weights are often given a second name; they need not be looked at.
        if node.is("Identity")
            && let Some(tensor) = node.input(0).and_then(|name| self.tensors.get(name))
        {
            return Ok(Some(Tensor { name: Some(output.clone()), ..tensor.clone() }));
        }
        let mut values = Vec::with_capacity(node.input.len());
        for name in &node.input {
            match self.tensors.get(name) {
                None => values.push(None),
                Some(tensor) => match network.value_of(tensor)? {
                    Some(value) => values.push(Some(value)),
                    None => return Ok(None),
                },
            }
        }
        let inputs: Vec<Option<&Value>> = values.iter().map(Option::as_ref).collect();
        Ok(evaluate(node, &inputs, network.opset()).map(|value| value.tensor(output)))
    }

    /// The value of a constant, if it is one and of a type that is held.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn value(&self, network: &Network, name: &str) -> Result<Option<Value>, OnnxError> {
        self.tensors.get(name).map_or(Ok(None), |tensor| network.value_of(tensor))
    }

    /// Whether it is constant.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Puts the values into the network in the place of the nodes that compute them.
    pub(crate) fn put(mut self, network: &mut Network) {
        let graph = network.graph_mut();
        // What has a default value is no input.
        graph.input.retain(|info| !info.name.as_ref().is_some_and(|name| self.tensors.contains_key(name)));
        for &n in self.computed.iter().rev() {
            let node = graph.node.remove(n);
            graph.initializer.extend(node.output.iter().filter_map(|name| self.tensors.remove(name)));
        }
        network.prune();
    }
}

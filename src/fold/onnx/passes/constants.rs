//! Evaluates what depends on constants alone, such as the effective weight of a normalised BatchNorm.

use std::collections::{HashMap, HashSet};

use super::super::evaluate::{cast, evaluate};
use super::super::proto::{Node, Tensor, Type, ValueInfo, kind};
use super::super::value::Value;
use super::super::{Network, OnnxError};

/// Operators whose first output is of the type of their first input.
const TYPE_OF_FIRST: [&str; 53] = [
    "Abs",
    "Add",
    "AveragePool",
    "BatchNormalization",
    "Ceil",
    "Celu",
    "Clip",
    "Concat",
    "Conv",
    "ConvTranspose",
    "Div",
    "Dropout",
    "Elu",
    "Erf",
    "Exp",
    "Expand",
    "Flatten",
    "Floor",
    "Gather",
    "Gelu",
    "Gemm",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "GroupNormalization",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "InstanceNormalization",
    "LayerNormalization",
    "LeakyRelu",
    "MatMul",
    "Max",
    "MaxPool",
    "Min",
    "Mish",
    "Mul",
    "Neg",
    "PRelu",
    "Pad",
    "Pow",
    "ReduceMax",
    "ReduceMean",
    "ReduceSum",
    "Relu",
    "Reshape",
    "Sigmoid",
    "Slice",
    "Softmax",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Transpose",
    "Unsqueeze",
];

/// Bytes that computed constants may take beyond twice the network's weights. More are left to the runtime.
const SPARE: usize = 64 << 20;

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
        let mut spare = SPARE.saturating_add(graph.initializer.iter().map(size).sum::<usize>().saturating_mul(2));
        let mut constants = Self { tensors: weights.collect(), computed: Vec::new(), left: Vec::new() };
        // Values that are 32-bit floats, as the pictures are.
        let is_float = |info: &&ValueInfo| info.r#type.as_ref().is_some_and(Type::is_float);
        let mut floats: HashSet<&str> = graph.input.iter().filter(is_float).filter_map(|i| i.name.as_deref()).collect();
        // Channels of values that convolutions make.
        let mut channels: HashMap<&str, i64> = HashMap::new();
        for (n, node) in graph.node.iter().enumerate() {
            if node.is("Conv") || node.is("ConvTranspose") {
                let weight = node.input(1).and_then(|name| constants.tensors.get(name));
                let count = match node.op() {
                    "Conv" => weight.and_then(|w| w.dims.first().copied()),
                    _ => weight.and_then(|w| w.dims.get(1)?.checked_mul(node.int("group").unwrap_or(1))),
                };
                channels.extend(node.output.first().map(String::as_str).zip(count));
            }
            if node.is("Shape")
                && (node.int("start"), node.int("end")) == (Some(1), Some(2))
                && let Some(count) = node.input(0).and_then(|name| channels.get(name))
                && let [output] = &node.output[..]
            {
                constants.tensors.insert(output.clone(), Value::indices(&[*count]).tensor(output));
                constants.computed.push(n);
                continue;
            }
            if node.is_standard()
                && TYPE_OF_FIRST.contains(&node.op())
                && node.input(0).is_some_and(|name| floats.contains(name))
            {
                floats.extend(node.output.first().map(String::as_str));
            }
            if node.is("CastLike")
                && node.input(1).is_some_and(|name| floats.contains(name))
                && let Some(tensor) = node.input(0).and_then(|name| constants.tensors.get(name))
                && let Some(value) = network.value_of(tensor)?.as_ref().and_then(|v| cast(v, kind::FLOAT))
                && let [output] = &node.output[..]
            {
                constants.tensors.insert(output.clone(), value.tensor(output));
                constants.computed.push(n);
                continue;
            }
            let fixed = node.input.iter().all(|name| name.is_empty() || constants.tensors.contains_key(name));
            if !fixed || (node.input.is_empty() && !node.is("Constant")) {
                continue;
            }
            match constants.compute(network, node)?.filter(|tensor| size(tensor) <= spare) {
                Some(tensor) => {
                    spare -= size(&tensor);
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

/// Bytes that a tensor's values take, wherever they lie; of one that shares another's, none.
fn size(tensor: &Tensor) -> usize {
    let each = if [kind::DOUBLE, kind::INT64].contains(&tensor.data_type.unwrap_or_default()) { 8 } else { 4 };
    let count = tensor.dims.iter().try_fold(each, |size, &d| usize::try_from(d).ok()?.checked_mul(size));
    count.unwrap_or(usize::MAX)
}

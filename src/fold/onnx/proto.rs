//! The messages of ONNX, by the fields that this program looks at. Source of the numbers: onnx.proto of ONNX 1.19.

use bytes::Bytes;

use super::wire::{Packed, messages};

/// Element types of tensors.
pub(crate) mod kind {
    pub(crate) const FLOAT: i32 = 1;
    pub(crate) const UINT8: i32 = 2;
    pub(crate) const INT8: i32 = 3;
    pub(crate) const UINT16: i32 = 4;
    pub(crate) const INT16: i32 = 5;
    pub(crate) const INT32: i32 = 6;
    pub(crate) const INT64: i32 = 7;
    pub(crate) const BOOL: i32 = 9;
    pub(crate) const FLOAT16: i32 = 10;
    pub(crate) const DOUBLE: i32 = 11;
    pub(crate) const UINT32: i32 = 12;
    pub(crate) const BFLOAT16: i32 = 16;

    /// Its name in ONNX.
    pub(crate) fn name(kind: i32) -> String {
        const NAMES: [&str; 17] = [
            "undefined",
            "float",
            "uint8",
            "int8",
            "uint16",
            "int16",
            "int32",
            "int64",
            "string",
            "bool",
            "float16",
            "double",
            "uint32",
            "uint64",
            "complex64",
            "complex128",
            "bfloat16",
        ];
        let known = usize::try_from(kind).ok().and_then(|kind| NAMES.get(kind));
        known.map_or_else(|| format!("type {kind}"), |name| (*name).to_owned())
    }
}

/// What an attribute holds.
pub(crate) mod attribute {
    pub(crate) const FLOAT: i32 = 1;
    pub(crate) const INT: i32 = 2;
    pub(crate) const INTS: i32 = 7;
}

messages! {
    /// A file.
    Model {
        ir_version: Option<i64> = 1,
        producer_name: Option<String> = 2,
        producer_version: Option<String> = 3,
        graph: Option<Graph> = 7,
        opset_import: Vec<OperatorSet> = 8,
        metadata_props: Vec<StringEntry> = 14,
        functions: Vec<Function> = 25,
    }

    /// The version of a domain's operators.
    OperatorSet {
        domain: Option<String> = 1,
        version: Option<i64> = 2,
    }

    /// Nodes in order of execution, and constants.
    Graph {
        node: Vec<Node> = 1,
        name: Option<String> = 2,
        initializer: Vec<Tensor> = 5,
        input: Vec<ValueInfo> = 11,
        output: Vec<ValueInfo> = 12,
        value_info: Vec<ValueInfo> = 13,
        quantization_annotation: Vec<TensorAnnotation> = 14,
        sparse_initializer: Vec<SparseTensor> = 15,
    }

    /// An operation.
    Node {
        input: Vec<String> = 1,
        output: Vec<String> = 2,
        name: Option<String> = 3,
        op_type: Option<String> = 4,
        attribute: Vec<Attribute> = 5,
        domain: Option<String> = 7,
        overload: Option<String> = 8,
    }

    /// A constant of an operation.
    Attribute {
        name: Option<String> = 1,
        f: Option<f32> = 2,
        i: Option<i64> = 3,
        s: Option<Bytes> = 4,
        t: Option<Tensor> = 5,
        g: Option<Graph> = 6,
        floats: Vec<f32> = 7,
        ints: Vec<i64> = 8,
        strings: Vec<Bytes> = 9,
        graphs: Vec<Graph> = 11,
        kind: Option<i32> = 20,
        /// In a function: the attribute of the call that stands here.
        ref_attr_name: Option<String> = 21,
    }

    /// Values of one type, here or in another file.
    Tensor {
        dims: Vec<i64> = 1,
        data_type: Option<i32> = 2,
        float_data: Packed<f32> = 4,
        int32_data: Packed<i32> = 5,
        string_data: Vec<Bytes> = 6,
        int64_data: Packed<i64> = 7,
        name: Option<String> = 8,
        raw_data: Option<Bytes> = 9,
        double_data: Packed<f64> = 10,
        uint64_data: Packed<u64> = 11,
        external_data: Vec<StringEntry> = 13,
        data_location: Option<i32> = 14,
    }

    /// A tensor that is mostly zero.
    SparseTensor {
        values: Option<Tensor> = 1,
    }

    /// What quantisation knows of a tensor.
    TensorAnnotation {
        tensor_name: Option<String> = 1,
    }

    /// A key and its value.
    StringEntry {
        key: Option<String> = 1,
        value: Option<String> = 2,
    }

    /// The name and type of an input, an output, or a value between.
    ValueInfo {
        name: Option<String> = 1,
        r#type: Option<Type> = 2,
    }

    /// A type; here only tensors' are looked at.
    Type {
        tensor_type: Option<TensorType> = 1,
    }

    /// Element type and shape.
    TensorType {
        elem_type: Option<i32> = 1,
        shape: Option<Shape> = 2,
    }

    /// The dimensions, as far as they are known.
    Shape {
        dim: Vec<Dimension> = 1,
    }

    /// A number, a name, or neither.
    Dimension {
        dim_value: Option<i64> = 1,
        dim_param: Option<String> = 2,
    }

    /// An operator that the file defines by others.
    Function {
        name: Option<String> = 1,
        input: Vec<String> = 4,
        output: Vec<String> = 5,
        attribute: Vec<String> = 6,
        node: Vec<Node> = 7,
        opset_import: Vec<OperatorSet> = 9,
        domain: Option<String> = 10,
        /// Attributes with their defaults.
        attribute_proto: Vec<Attribute> = 11,
        overload: Option<String> = 13,
    }
}

impl Node {
    /// The operator's name.
    pub(crate) fn op(&self) -> &str {
        self.op_type.as_deref().unwrap_or_default()
    }

    /// Whether its operator is one of ONNX's own.
    pub(crate) fn is_standard(&self) -> bool {
        matches!(self.domain.as_deref().unwrap_or_default(), "" | "ai.onnx")
    }

    /// Whether it is ONNX's own operator `op`.
    pub(crate) fn is(&self, op: &str) -> bool {
        self.is_standard() && self.op() == op
    }

    /// What errors call it: its name, else its first output.
    pub(crate) fn label(&self) -> &str {
        let name = self.name.as_deref().filter(|name| !name.is_empty());
        name.or(self.output.first().map(String::as_str)).unwrap_or("a node without a name")
    }

    /// An attribute.
    pub(crate) fn attribute(&self, name: &str) -> Option<&Attribute> {
        self.attribute.iter().find(|attribute| attribute.name.as_deref() == Some(name))
    }

    /// An attribute that is a whole number.
    pub(crate) fn int(&self, name: &str) -> Option<i64> {
        self.attribute(name)?.i
    }

    /// An attribute that is a list of whole numbers.
    pub(crate) fn ints(&self, name: &str) -> Option<&[i64]> {
        self.attribute(name).map(|attribute| attribute.ints.as_slice())
    }

    /// An attribute that is a number.
    pub(crate) fn float(&self, name: &str) -> Option<f32> {
        self.attribute(name)?.f
    }

    /// An attribute that is a tensor.
    pub(crate) fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.attribute(name)?.t.as_ref()
    }

    /// Input `n`, unless it is left out.
    pub(crate) fn input(&self, n: usize) -> Option<&str> {
        self.input.get(n).map(String::as_str).filter(|name| !name.is_empty())
    }

    /// Graphs within it, such as the branches of If.
    pub(crate) fn graphs(&self) -> impl Iterator<Item = &Graph> {
        self.attribute.iter().flat_map(|attribute| attribute.g.iter().chain(&attribute.graphs))
    }

    /// As [`Node::graphs`], to be changed.
    pub(crate) fn graphs_mut(&mut self) -> impl Iterator<Item = &mut Graph> {
        self.attribute.iter_mut().flat_map(|attribute| attribute.g.iter_mut().chain(&mut attribute.graphs))
    }
}

impl OperatorSet {
    /// ONNX's own is the empty one.
    pub(crate) fn domain(&self) -> &str {
        self.domain.as_deref().unwrap_or_default()
    }
}

impl Type {
    /// Whether it is a tensor of 32-bit floats.
    pub(crate) fn is_float(&self) -> bool {
        self.tensor_type.as_ref().is_some_and(|tensor| tensor.elem_type == Some(kind::FLOAT))
    }
}

impl Tensor {
    /// Its name, which is its value's.
    pub(crate) fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_default()
    }

    /// Whether its values lie in another file.
    pub(crate) fn is_external(&self) -> bool {
        self.data_location == Some(1)
    }
}

impl Attribute {
    /// A whole number.
    pub(crate) fn int(name: &str, i: i64) -> Self {
        Self { name: Some(name.into()), i: Some(i), kind: Some(attribute::INT), ..Self::default() }
    }

    /// Whole numbers.
    pub(crate) fn ints(name: &str, ints: &[i64]) -> Self {
        Self { name: Some(name.into()), ints: ints.to_vec(), kind: Some(attribute::INTS), ..Self::default() }
    }

    /// A number.
    pub(crate) fn float(name: &str, f: f32) -> Self {
        Self { name: Some(name.into()), f: Some(f), kind: Some(attribute::FLOAT), ..Self::default() }
    }
}

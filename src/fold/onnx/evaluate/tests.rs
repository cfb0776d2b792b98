use std::collections::BTreeSet;

use ndarray::{ArrayD, IxDyn};

use super::super::Network;
use super::super::proto::{Attribute, Graph, Model, Node, OperatorSet, Shape, TensorType, Type, ValueInfo, kind};
use super::*;
use crate::runtime::{Library, PlainSession, SessionOptions};

fn floats(dims: &[usize], from: f64) -> Value {
    let mut next = from - 0.37;
    let values = ArrayD::from_shape_simple_fn(IxDyn(dims), || {
        next += 0.37;
        next
    });
    Float::Single.round(values)
}

fn whole(values: &[i64]) -> Value {
    Value::indices(values)
}

fn truth(values: &[i64]) -> Value {
    Value::integers(kind::BOOL, ArrayD::from_shape_vec(IxDyn(&[values.len()]), values.to_vec()).unwrap()).unwrap()
}

/// What ONNX Runtime gives for the node, as floats.
fn runtime(node: &Node, inputs: &[Value]) -> Vec<f64> {
    let library = Library::load(None).unwrap();
    let names: Vec<String> = (0..inputs.len()).map(|n| format!("i{n}")).collect();
    let cast = Node {
        input: vec!["r".into()],
        output: vec!["y".into()],
        op_type: Some("Cast".into()),
        attribute: vec![Attribute::int("to", 1)],
        ..Node::default()
    };
    let info = |name: &str| ValueInfo {
        name: Some(name.into()),
        r#type: Some(Type {
            tensor_type: Some(TensorType {
                elem_type: Some(kind::FLOAT),
                shape: (name == "x").then(|| Shape { dim: vec![Default::default()], ..Shape::default() }),
                ..TensorType::default()
            }),
            ..Type::default()
        }),
        ..ValueInfo::default()
    };
    let model = Network::of_model(Model {
        ir_version: Some(8),
        opset_import: vec![OperatorSet { version: Some(17), ..OperatorSet::default() }],
        graph: Some(Graph {
            name: Some("g".into()),
            node: vec![Node { input: names.clone(), output: vec!["r".into()], ..node.clone() }, cast],
            initializer: inputs.iter().zip(&names).map(|(value, name)| value.tensor(name)).collect(),
            input: vec![info("x")],
            output: vec![info("y")],
            ..Graph::default()
        }),
        ..Model::default()
    });
    let mut session = PlainSession::open(library, &model.encode(), SessionOptions::default())
        .unwrap_or_else(|error| panic!("{}: {error}", node.op()));
    let found = session.run("x", ArrayD::zeros(IxDyn(&[1])).view(), &["y"]).unwrap();
    found[0].iter().map(|&v| f64::from(v)).collect()
}

#[test]
fn every_operator_gives_what_onnx_runtime_gives() {
    let ints = Attribute::ints;
    let int = Attribute::int;
    let two = || vec![floats(&[2, 3], -0.9), floats(&[1, 3], 0.4)];
    let one = || vec![floats(&[2, 3], -0.9)];
    let positive = || vec![floats(&[2, 3], 0.2)];
    let unit = |op: &str, attribute: Vec<Attribute>, inputs: Vec<Value>| {
        let node = Node { op_type: Some(op.into()), output: vec!["r".into()], attribute, ..Node::default() };
        (Node { input: vec!["i".into(); inputs.len()], ..node }, inputs)
    };
    let mut cases: Vec<(Node, Vec<Value>)> = Vec::new();
    for op in ["Add", "Sub", "Mul", "Div", "Max", "Min", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"] {
        cases.push(unit(op, vec![], two()));
        cases.push(unit(op, vec![], vec![whole(&[7, -7, 3]), whole(&[2, 2, 3])]));
    }
    for op in ["Abs", "Neg", "Sign", "Relu", "Exp", "Tanh", "Sigmoid", "Softplus", "Floor", "Ceil", "Identity", "Size"]
    {
        cases.push(unit(op, vec![], one()));
    }
    for op in ["Sqrt", "Log", "Reciprocal"] {
        cases.push(unit(op, vec![], positive()));
    }
    for op in ["ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"] {
        cases.push(unit(op, vec![ints("axes", &[1])], vec![floats(&[2, 3, 2], -1.1)]));
        cases.push(unit(op, vec![ints("axes", &[0, -1]), int("keepdims", 0)], vec![floats(&[2, 3, 2], -1.1)]));
        cases.push(unit(op, vec![], one()));
    }
    for op in ["And", "Or"] {
        cases.push(unit(op, vec![], vec![truth(&[0, 0, 1, 1]), truth(&[0, 1, 0, 1])]));
    }
    let long = i64::MAX;
    cases.extend([
        unit("Not", vec![], vec![truth(&[0, 1])]),
        unit("ReduceSum", vec![], vec![floats(&[2, 3], -1.1), whole(&[1])]),
        unit("Pow", vec![], vec![floats(&[2, 3], 0.2), floats(&[1], 2.0)]),
        unit("Pow", vec![], vec![whole(&[2, 3]), whole(&[3, 2])]),
        unit("Clip", vec![], vec![floats(&[2, 3], -0.9), floats(&[], -0.2), floats(&[], 0.3)]),
        unit("Cast", vec![int("to", kind::INT64.into())], one()),
        unit("Cast", vec![int("to", kind::BOOL.into())], vec![whole(&[0, 2])]),
        unit("Cast", vec![int("to", kind::INT8.into())], vec![whole(&[300, -1])]),
        unit("CastLike", vec![], vec![whole(&[3, -1]), floats(&[1], 0.0)]),
        unit("Where", vec![], vec![truth(&[1, 0, 1]), floats(&[2, 3], -0.9), floats(&[1], 9.0)]),
        unit("MatMul", vec![], vec![floats(&[2, 3], -0.9), floats(&[3, 4], 0.1)]),
        unit(
            "Gemm",
            vec![int("transB", 1), Attribute::float("alpha", 0.5), Attribute::float("beta", 2.0)],
            vec![floats(&[2, 3], -0.9), floats(&[4, 3], 0.1), floats(&[4], 1.0)],
        ),
        unit("Shape", vec![int("start", 1), int("end", -1)], vec![floats(&[2, 3, 4, 5], 0.0)]),
        unit("Shape", vec![], vec![floats(&[2, 3], 0.0)]),
        unit("ConstantOfShape", vec![], vec![whole(&[2, 3])]),
        unit(
            "Range",
            vec![],
            vec![
                Value::integers(kind::INT64, ArrayD::from_elem(IxDyn(&[]), 1)).unwrap(),
                Value::integers(kind::INT64, ArrayD::from_elem(IxDyn(&[]), 8)).unwrap(),
                Value::integers(kind::INT64, ArrayD::from_elem(IxDyn(&[]), 3)).unwrap(),
            ],
        ),
        unit("Reshape", vec![], vec![floats(&[2, 3, 4], 0.0), whole(&[0, -1, 2])]),
        unit("Flatten", vec![int("axis", 2)], vec![floats(&[2, 3, 4], 0.0)]),
        unit("Squeeze", vec![], vec![floats(&[2, 1, 3], 0.0), whole(&[1])]),
        unit("Unsqueeze", vec![], vec![floats(&[2, 3], 0.0), whole(&[0, -1])]),
        unit("Transpose", vec![ints("perm", &[2, 0, 1])], vec![floats(&[2, 3, 4], 0.0)]),
        unit("Transpose", vec![], one()),
        unit("Expand", vec![], vec![floats(&[3, 1], 0.0), whole(&[2, 1, 4])]),
        unit("Concat", vec![int("axis", -1)], vec![floats(&[2, 3], 0.0), floats(&[2, 2], 5.0)]),
        unit("Gather", vec![int("axis", 1)], vec![floats(&[2, 3], 0.0), whole(&[2, -3, 0])]),
        unit(
            "Slice",
            vec![],
            vec![floats(&[3, 5], 0.0), whole(&[1, 0]), whole(&[long, -1]), whole(&[0, 1]), whole(&[1, 2])],
        ),
    ]);
    let mut tried: BTreeSet<&str> = ["Constant"].into();
    for (node, inputs) in &cases {
        let op = node.op();
        let given: Vec<Option<&Value>> = inputs.iter().map(Some).collect();
        let found = evaluate(node, &given, 17).unwrap_or_else(|| panic!("{op} {:?}", node.attribute));
        let expected = runtime(node, inputs);
        let found: Vec<f64> = found.numbers().iter().copied().collect();
        assert_eq!(found.len(), expected.len(), "{op} {:?}", node.attribute);
        for (a, b) in found.iter().zip(&expected) {
            assert!((a - b).abs() <= 1e-6 * b.abs().max(1.0), "{op} {:?}: {a} {b}", node.attribute);
        }
        tried.extend(OPERATORS.iter().filter(|known| **known == op));
    }
    assert_eq!(tried.len(), OPERATORS.len());
}

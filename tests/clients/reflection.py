"""gRPC's own services: reflection, from which a client that knows nothing builds its messages, and the health's Watch.

    python reflection.py HOST:PORT [--model cifar10-lt]     the server needs --control
    python reflection.py --write                            compiles src/serve/v2/inference.proto anew

The messages are held to the ones that tritonclient has.
"""

import argparse
import pathlib
import queue
import sys
import tempfile
import threading

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_reflection.v1alpha import reflection_pb2
from grpc_tools import protoc
from tritonclient.grpc import model_config_pb2, service_pb2

from common import Report, encoded, picture

HERE = pathlib.Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src/serve/v2"
SERVICE = "inference.GRPCInferenceService"


def compiled():
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "inference.pb"
        status = protoc.main(["protoc", f"-I{SOURCE}", f"--descriptor_set_out={out}", "inference.proto"])
        assert status == 0, f"protoc ends with {status}"
        return out.read_bytes()


def same_message(ours, theirs):
    """Every field of ours is one of theirs, with the same name, number and type."""
    for field in ours.fields:
        other = theirs.fields_by_name.get(field.name)
        name = f"{ours.full_name}.{field.name}"
        assert other, f"tritonclient has no {name}"
        for what in ["number", "type", "is_repeated"]:
            mine, its = getattr(field, what), getattr(other, what)
            assert mine == its, f"{what} of {name} is {mine}, and {its} in tritonclient"
        for kind in ["message_type", "enum_type"]:
            mine, its = getattr(field, kind), getattr(other, kind)
            assert (mine and mine.full_name) == (its and its.full_name), f"{kind} of {name}"
    for nested in ours.nested_types:
        same_message(nested, theirs.nested_types_by_name[nested.name])


def check(report, address, model):
    with report.check("reflection: the compiled file is that of the source"):
        assert compiled() == (SOURCE / "inference.pb").read_bytes(), "run reflection.py --write"
    with report.check("reflection: messages, values and calls are tritonclient's") as figures:
        pool = descriptor_pool.DescriptorPool()
        files = descriptor_pb2.FileDescriptorSet.FromString(compiled()).file
        for file in files:
            pool.Add(file)
        ours = pool.FindFileByName("inference.proto")
        theirs = {**service_pb2.DESCRIPTOR.message_types_by_name, **model_config_pb2.DESCRIPTOR.message_types_by_name}
        for name, message in ours.message_types_by_name.items():
            same_message(message, theirs[name])
        for name, enum in ours.enum_types_by_name.items():
            other = model_config_pb2.DESCRIPTOR.enum_types_by_name[name]
            assert [(v.name, v.number) for v in enum.values] == [(v.name, v.number) for v in other.values], name
        calls = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
        for call in ours.services_by_name["GRPCInferenceService"].methods:
            other = calls[call.name]
            pair = (call.input_type.full_name, call.output_type.full_name)
            assert pair == (other.input_type.full_name, other.output_type.full_name), call.name
        figures.append(f"{len(ours.message_types_by_name)} messages")
    with grpc.insecure_channel(address) as channel:
        with report.check("reflection: a picture is scored with nothing known in advance"):
            database = ProtoReflectionDescriptorDatabase(channel)
            services = list(database.get_services())
            assert SERVICE in services and "grpc.health.v1.Health" in services, services
            found = descriptor_pool.DescriptorPool(database)
            method = found.FindServiceByName(SERVICE).methods_by_name["ModelInfer"]
            ask, answer = (message_factory.GetMessageClass(t) for t in (method.input_type, method.output_type))
            call = channel.unary_unary(f"/{SERVICE}/ModelInfer", ask.SerializeToString, answer.FromString)
            request = ask(model_name=model)
            request.inputs.add(name="image", datatype="BYTES", shape=[1]).contents.bytes_contents.append(
                encoded(picture(40, 30))
            )
            reply = call(request, timeout=30)
            assert [output.name for output in reply.outputs] and reply.raw_output_contents, reply
        with report.check("reflection: version 1, a symbol that is not there, a stream that stays open"):
            for version in ["v1", "v1alpha"]:
                path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
                talk = channel.stream_stream(
                    path,
                    reflection_pb2.ServerReflectionRequest.SerializeToString,
                    reflection_pb2.ServerReflectionResponse.FromString,
                )
                questions = queue.Queue()
                questions.put(reflection_pb2.ServerReflectionRequest(list_services=""))
                answers = talk(iter(questions.get, None), timeout=60)
                names = [service.name for service in next(answers).list_services_response.service]
                assert f"grpc.reflection.{version}.ServerReflection" in names, names
                # It ends when a request's body would have to be complete.
                assert not list(answers)
                questions.put(None)
            try:
                unknown = reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such.Symbol")
                list(talk(iter([unknown]), timeout=10))
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.NOT_FOUND, error
            else:
                raise AssertionError("it is there")
        with report.check("health: a watch is told of a model that goes and comes back"):
            health = health_pb2_grpc.HealthStub(channel)
            said = queue.Queue()
            watch = health.Watch(health_pb2.HealthCheckRequest(service=model))

            def listen():
                try:
                    for answer in watch:
                        said.put(answer.status)
                except grpc.RpcError as error:
                    said.put(error.code())

            threading.Thread(target=listen, daemon=True).start()
            control = channel.unary_unary(
                f"/{SERVICE}/RepositoryModelUnload",
                service_pb2.RepositoryModelUnloadRequest.SerializeToString,
                service_pb2.RepositoryModelUnloadResponse.FromString,
            )
            load = channel.unary_unary(
                f"/{SERVICE}/RepositoryModelLoad",
                service_pb2.RepositoryModelLoadRequest.SerializeToString,
                service_pb2.RepositoryModelLoadResponse.FromString,
            )
            states = health_pb2.HealthCheckResponse
            assert said.get(timeout=10) == states.SERVING
            control(service_pb2.RepositoryModelUnloadRequest(model_name=model), timeout=30)
            assert said.get(timeout=10) == states.SERVICE_UNKNOWN
            load(service_pb2.RepositoryModelLoadRequest(model_name=model), timeout=60)
            assert said.get(timeout=10) == states.SERVING
            watch.cancel()
            assert said.get(timeout=10) == grpc.StatusCode.CANCELLED
            assert health.Check(health_pb2.HealthCheckRequest(service=model), timeout=10).status == states.SERVING


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", nargs="?")
    parser.add_argument("--model", default="cifar10-lt")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.write:
        (SOURCE / "inference.pb").write_bytes(compiled())
        return 0
    if not arguments.address:
        parser.error("give the server's address")
    report = Report()
    check(report, arguments.address, arguments.model)
    return report.end()


if __name__ == "__main__":
    sys.exit(main())

from concurrent.futures import ThreadPoolExecutor
import asyncio

from fastapi import FastAPI, Request

from network import Network

app = FastAPI()
network = Network()
pool = ThreadPoolExecutor(1)


@app.post("/classify")
async def classify(request: Request):
    body = await request.body()
    return await asyncio.get_running_loop().run_in_executor(pool, network.classify, body)

# A server on a CPU: docker build -t nar . && docker run -p 8000:8000 -v nar:/data nar fashion emoji clips
FROM python:3.12-slim
COPY . /src
# torch first and alone, so that no other package's range decides which build comes.
RUN pip install --no-cache-dir --constraint /src/constraints.txt torch \
    && pip install --no-cache-dir --constraint /src/constraints.txt '/src[serve,text,video]' \
    && rm -rf /src && useradd --create-home nar && mkdir /data && chown nar /data
USER nar
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["nar", "serve", "--host", "0.0.0.0", "--videos", "/data/videos"]
CMD ["fashion"]

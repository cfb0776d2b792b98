// Shows the server's own description of its interface.
SwaggerUIBundle({
  url: '../openapi.yaml',
  dom_id: '#swagger-ui',
  deepLinking: true,
});

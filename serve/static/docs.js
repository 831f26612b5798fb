// Swagger UI over this service's own document; validatorUrl null: nothing is sent to another host.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null });

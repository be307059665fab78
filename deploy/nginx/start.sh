#!/bin/sh
# Starts nginx, which by itself would serve an expired certificate without a word.
certificate=${CERTIFICATE:-/run/secrets/tls_certificate}
if ! openssl x509 -in "$certificate" -noout -checkend 0 >/dev/null 2>&1; then
    echo "nginx: the certificate in $certificate has expired, or is none;" \
        "put another one there: docs/deploy.md, Certificates" >&2
    exit 1
fi
exec nginx -c "${CONFIG:-/etc/nginx/nginx.conf}" -g "daemon off;"
